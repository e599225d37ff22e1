"""Settings as they are typed: a home folder's ``~``, and values that Hydra's grammar takes for something else than text."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from tinyfusion_pl.cli.run_identity import items

KEY = re.compile(r"~?\+{0,2}[A-Za-z_$][\w$@:./-]*", re.ASCII)
ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*\\)\$\{")  # a reference after an odd number of backslashes
FUNCTIONS = tuple(f"{name}(" for name in create_functions().functions)


def readable(arguments: Sequence[str]) -> list[str]:
    """`arguments` with ``~`` and ``~user`` at the start of values replaced by that home folder.

    Raises:
        ValueError: for an override that Hydra cannot read; shows how to quote it.
    """
    overrides, parser = get_args_parser().parse_args(arguments).overrides, OverridesParser.create()
    found = []
    for argument in arguments:
        if argument in overrides:
            argument = _at_home(argument)
            try:
                parsed = parser.parse_override(argument)
            except HydraException as error:
                raise ValueError(_unreadable(argument, error)) from error
            if not parsed.is_delete():
                _check_text(argument, parsed.value())
        found.append(argument)
    return found


def _at_home(override: str) -> str:
    key, equal, value = override.partition("=")
    if (
        "~" not in value or '"' in value or "'" in value
    ):  # in quotes Hydra reads it; see `expand_home`
        return override
    # Commas part the jobs of a sweep, and what lists and mappings hold.
    start, end = (r"[\[{,:]\s*", r",\]}") if value[0] in "[{" else (r"(?:^|,)\s*", ",")
    return f"{key}{equal}" + re.sub(
        rf"({start})(~[^{end}]*)", lambda found: found[1] + _home(found[2].strip(), override), value
    )


def _home(path: str, override: str) -> str:
    if (expanded := os.path.expanduser(path)) == path:
        user = path[1:].partition("/")[0]
        raise ValueError(
            f"{override}: there is no user {user!r} whose home folder that could be. A file of this name is ./{path}."
        )
    return QuotedString(expanded, Quote.double).with_quotes()


def quoted(override: str) -> str:
    """`override` as it is typed in a shell so that its value is text."""
    key, _, value = override.partition("=")
    text = QuotedString(value.replace("${", r"\${"), Quote.double).with_quotes()
    return shlex.quote(f"{key}={text}")


def _unreadable(override: str, error: HydraException) -> str:
    key, equal, value = override.partition("=")
    if not equal and not override.startswith("~"):
        return f"{override!r} is no setting: settings are KEY=VALUE. Quote a value with spaces as a whole: 'KEY=\"VALUE\"'."
    if not KEY.fullmatch(key):
        return f"{key!r} of {override!r} is no name of a setting; --help lists them."
    reason = " ".join(str(error).split())
    if (value[:1], value[-1:]) in (("[", "]"), ("{", "}")):
        example = shlex.quote(f'{key}=["TEXT"]' if value[0] == "[" else f'{key}={{NAME: "TEXT"}}')
        return (f"{override} cannot be read ({reason}). In lists and mappings, quote each text that has other characters than "
                f"letters, digits and _-./ in it: {example}.")  # fmt: skip
    if value.startswith(FUNCTIONS) and value.endswith(")"):
        return f"{override} cannot be read ({reason}). If it is text, quote it: {quoted(override)}."
    return f"{override} cannot be read: its value has characters of Hydra's grammar. Quote it, so that it is text: {quoted(override)}."


def _check_text(override: str, value: object) -> None:
    key, _, written = override.partition("=")
    if written == "None":
        raise ValueError(
            f"{override} is the text 'None'. For no value give {key}=null, and for the text {quoted(override)}."
        )
    if (
        key == "run_dir"
        and value is not None
        and not isinstance(value, str)
        and str(value) != written
        and written[:1] not in "[{"
    ):
        raise ValueError(
            f"{override} is read as {value!r}. Quote it, so that it is text: {quoted(override)}."
        )


def keep_escaped(node: DictConfig | ListConfig) -> None:
    r"""Escape text that has ``\\${`` in it once more: Hydra reads each value twice as it builds."""
    for key, value in items(OmegaConf.to_container(node, resolve=False)):
        if isinstance(value, str) and ESCAPED.search(value):
            node[key] = ESCAPED.sub(lambda found: found[1] * 2 + r"\${", value)
        elif isinstance(value, (dict, list)):
            keep_escaped(node[key])


def ambiguous(override: str) -> str:
    """What to say of an override whose commas make a sweep of it, in a command that runs a single job."""
    key, _, value = override.partition("=")
    listed = shlex.quote(f"{key}=[{value}]")
    return (f"{override} is several values, for a sweep: add -m to run each of them. If the commas are part of a text, quote it: "
            f"{quoted(override)}; for a list give {listed}.")  # fmt: skip


def check_added(cfg: DictConfig) -> None:
    """Refuse ``+experimnt=x``: Hydra adds it as a setting that nothing reads, and the default would run."""
    if not HydraConfig.initialized():
        return
    for override in HydraConfig.get().overrides.task:
        key = override.removeprefix("+").partition("=")[0]
        if (
            override.startswith("+")
            and "." not in key
            and "@" not in key
            and key in cfg
            and not OmegaConf.is_config(cfg[key])
        ):
            raise ValueError(
                f"There is no configuration group {key!r} to add ({override}). Groups to add are +experiment, +sweep and "
                "+debug; --help lists the choices."
            )


def expand_home(node: DictConfig | ListConfig) -> None:
    """Replace ``~`` and ``~user`` at the start of all text in a configuration."""
    for key, value in items(OmegaConf.to_container(node, resolve=False)):
        if isinstance(value, str) and value.startswith("~"):
            node[key] = os.path.expanduser(value)
        elif isinstance(value, (dict, list)) and OmegaConf.is_config(node[key]):
            expand_home(node[key])
