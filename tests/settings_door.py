"""The command line's checks without its processes: a configuration is composed once, overrides are put into it, and what would run stops
where a run begins.
"""

import copy
import shlex
import traceback
from functools import cache

from hydra import compose, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from tinyfusion_pl.cli import command_line
from tinyfusion_pl.cli.errors import sentence
from tinyfusion_pl.cli.overrides import expand_home, readable
from tinyfusion_pl.cli.settings import checked


class Begun(Exception):
    """All checks have passed: from here on files are written, and stages run."""


@cache
def composed(*groups):
    """The configuration of choices of groups, which must not be changed."""
    with initialize_config_module("tinyfusion_pl.conf", version_base="1.3"):
        return compose("main", list(groups))


def configured(overrides, groups=()):
    """The configuration of a command line whose `groups` are choices and `overrides` values."""
    cfg = copy.deepcopy(composed(*groups))
    parsed = OverridesParser.create().parse_overrides(readable(overrides))
    ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
    OmegaConf.set_struct(cfg, True)
    return cfg


def passed(line):
    """What `checked` makes of a command line, as a shell reads it."""
    groups, overrides = split(line)
    cfg = configured(overrides, groups)
    expand_home(cfg)
    return checked(cfg)


def split(line):
    """(choices of groups, other overrides) of a command line."""
    words = shlex.split(line)
    return [w for w in words if is_group(w)], [w for w in words if not is_group(w)]


def is_group(word):
    key = word.partition("=")[0]
    return (
        "@" in key
        or key in ("+experiment", "+debug")
        or (key in GROUPS and not word.endswith("=null"))
    )


GROUPS = (
    "task",
    "model",
    "data",
    "objective",
    "pruning",
    "adapter",
    "distill",
    "metrics",
    "logger",
    "recipe",
    "runtime",
    "trainer",
)


def refusal(line, run_dir, monkeypatch):
    """What a command line is refused with, or "" where a run would begin; fails on what the command line would show as a traceback."""

    def stop(*_, **__):
        raise Begun

    monkeypatch.setattr(command_line, "write_config", stop)
    groups, overrides = split(line)
    try:
        command_line.run(configured(overrides, groups), run_dir)
    except Begun:
        return ""
    except Exception as error:
        told = sentence(error, overrides)
        assert told is not None, "".join(traceback.format_exception(error))
        return told
    raise AssertionError("the task ended without a run having begun")
