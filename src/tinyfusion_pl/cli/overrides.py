"""Overrides as typed in a shell: ``~``, and values that need quotes in Hydra's grammar."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf

from tinyfusion_pl.cli.paths import expand_user
from tinyfusion_pl.cli.run_identity import items

KEY = re.compile(r"~?\+{0,2}[A-Za-z_$][\w$@:./-]*", re.ASCII)
# A reference after an odd number of backslashes.
ESCAPED = re.compile(r"(?<!\\)((?:\\\\)*\\)\$\{")
FUNCTIONS = tuple(f"{name}(" for name in create_functions().functions)


def readable(arguments: Sequence[str]) -> list[str]:
    """`arguments` with a leading ``~`` or ``~user`` of each value expanded.

    Raises:
        ValueError: for an override that Hydra cannot parse; shows how to quote it.
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
    if "~" not in value or '"' in value or "'" in value:  # quoted values: see `expand_home`
        return override
    # Commas separate the jobs of a sweep, and the items of lists and mappings.
    start, end = (r"[\[{,:]\s*", r",\]}") if value[0] in "[{" else (r"(?:^|,)\s*", ",")
    return f"{key}{equal}" + re.sub(
        rf"({start})(~[^{end}]*)", lambda found: found[1] + _home(found[2].strip(), override), value
    )


def _home(path: str, override: str) -> str:
    if (expanded := expand_user(path)) == path:
        user = path[1:].partition("/")[0]
        raise ValueError(
            f"{override}: no user {user!r} exists, so {path} has no home folder. For a file of "
            f"this name write ./{path}."
        )
    return QuotedString(expanded, Quote.double).with_quotes()


def quoted(override: str) -> str:
    """`override` as typed in a shell so that its value is a string."""
    key, _, value = override.partition("=")
    text = QuotedString(value.replace("${", r"\${"), Quote.double).with_quotes()
    return shlex.quote(f"{key}={text}")


def _unreadable(override: str, error: HydraException) -> str:
    key, equal, value = override.partition("=")
    if not equal and not override.startswith("~"):
        return (
            f"{override!r} is not a valid override; expected KEY=VALUE. Quote a value that "
            "contains spaces: 'KEY=\"VALUE\"'."
        )
    if not KEY.fullmatch(key):
        return f"{key!r} in {override!r} is not a valid key; --cfg job lists all settings."
    reason = " ".join(str(error).split())
    if (value[:1], value[-1:]) in (("[", "]"), ("{", "}")):
        example = shlex.quote(f'{key}=["TEXT"]' if value[0] == "[" else f'{key}={{NAME: "TEXT"}}')
        return (
            f"{override} could not be parsed ({reason}). In lists and mappings, quote each string "
            f"that contains characters other than letters, digits and _-./: {example}."
        )
    if value.startswith(FUNCTIONS) and value.endswith(")"):
        return (
            f"{override} could not be parsed ({reason}). For a string, quote it: "
            f"{quoted(override)}."
        )
    return (
        f"{override} could not be parsed: the value contains special characters of Hydra's "
        f"grammar. Quote it: {quoted(override)}."
    )


def _check_text(override: str, value: object) -> None:
    key, _, written = override.partition("=")
    if written == "None":
        raise ValueError(
            f"{override} is the string 'None'. For no value give {key}=null; for the string, "
            f"{quoted(override)}."
        )
    if (
        key == "run_dir"
        and value is not None
        and not isinstance(value, str)
        and str(value) != written
        and written[:1] not in "[{"
    ):
        raise ValueError(
            f"{override} is parsed as {value!r}. For a string, quote it: {quoted(override)}."
        )


def keep_escaped(node: DictConfig | ListConfig) -> None:
    r"""Escape ``\\${`` in strings once more: Hydra resolves each value twice on instantiation."""
    for key, value in items(OmegaConf.to_container(node, resolve=False)):
        if isinstance(value, str) and ESCAPED.search(value):
            node[key] = ESCAPED.sub(lambda found: found[1] * 2 + r"\${", value)
        elif isinstance(value, (dict, list)):
            keep_escaped(node[key])


def ambiguous(override: str) -> str:
    """The message for an override with several values in a command that runs a single job."""
    key, _, value = override.partition("=")
    listed = shlex.quote(f"{key}=[{value}]")
    return (
        f"{override} has several values, as a sweep has: add -m to run each of them. If the commas "
        f"belong to a string, quote it: {quoted(override)}; for a list give {listed}."
    )


def check_added(cfg: DictConfig) -> None:
    """Raise a ValueError for ``+experimnt=x``.

    Hydra would add it as a setting that nothing reads, and run the default configuration.
    """
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
                f"There is no configuration group {key!r} to add ({override}). Groups to add are "
                "+experiment, +sweep and +debug; --help lists their choices."
            )


def expand_home(node: DictConfig | ListConfig) -> None:
    """Expand a leading ``~`` or ``~user`` of all strings in a configuration."""
    for key, value in items(OmegaConf.to_container(node, resolve=False)):
        if isinstance(value, str) and value.startswith("~"):
            node[key] = expand_user(value)
        elif isinstance(value, (dict, list)) and OmegaConf.is_config(node[key]):
            expand_home(node[key])
