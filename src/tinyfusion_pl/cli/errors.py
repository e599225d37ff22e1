"""How an error is reported: in one sentence where a person can do something about it, with a traceback where the code is at fault."""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from tinyfusion_pl.cli.overrides import ambiguous
from tinyfusion_pl.printable import for_terminal

NO_GROUPS = ("name", "seed", "run_dir")


class Told(Exception):
    """A job of a sweep failed, and the error was told."""


@contextmanager
def printable_warnings() -> Iterator[None]:
    """Warnings that are shown inside the block have no control characters, whichever names they quote."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: for_terminal(before(*args, **kwargs))
    try:
        yield
    finally:
        warnings.formatwarning = before


def tell(error: Exception, arguments: Sequence[str] = ()) -> int:
    """Report `error` of the command line `arguments` on stderr; returns the exit code."""
    if isinstance(error, Told):
        return 1
    told = sentence(error, arguments)
    verbose = HydraConfig.initialized() and HydraConfig.get().verbose
    if told is None or verbose or os.environ.get("TINYFUSION_TRACEBACK") == "1":
        traceback.print_exception(error)
    exit_code = getattr(
        error, "exit_code", None
    )  # an outcome that is no error, as an unfinished stage
    print(for_terminal(told if exit_code else f"error: {told or repr(error)}"), file=sys.stderr)
    return exit_code or 1


def _without_worker(error: BaseException) -> str:
    """What an error says, without the traceback that a DataLoader's worker process puts around it."""
    inner = re.search(
        r"\ACaught (\w+) in DataLoader worker process.*\n(?:[\w.]*\.)?\1: (.*)\Z",
        str(error),
        re.DOTALL,
    )
    return inner[2].strip() if inner else str(error)


def _of_hydra(error: HydraException, arguments: Sequence[str]) -> str:
    """What Hydra says, with the setting that it is about."""
    told = "\n".join(str(each) for each in (error, error.__cause__) if each is not None)
    merged = re.search(r"Error merging override \+*([^=\s]+)=(.*)", told)
    if merged and "Cannot merge DictConfig" in told:
        return f"{merged[1]} is {merged[2]}; give a mapping, or one setting inside it: {merged[1]}.NAME=VALUE."
    if unknown := re.match(
        r"Could not override '(.*)'\.\nTo append to your config use \+(.*)\n", told
    ):
        return (f"Could not override '{unknown[1]}': the configuration has no such setting; --cfg job shows all that it has. To set an "
                f"argument that it leaves at its default, write +{unknown[2]}.")  # fmt: skip
    return told


def _of_group(error: ValueError, arguments: Sequence[str]) -> str:
    """What to say where a group was given something else than names."""
    given = [each.lstrip("+").partition("=") for each in arguments]
    names = [
        key
        for key, _, value in given
        if value
        and "." not in key.partition("@")[0]
        and key not in NO_GROUPS
        and (value == "null" or not re.fullmatch(r"[A-Za-z_][\w./-]*", value))
    ]
    return (f"{' or '.join(names) or 'A group'}: a group of the configuration is chosen by name, as --help lists them; a setting in it is "
            f"given as {names[0].rpartition('@')[2] if names else 'GROUP'}.NAME=VALUE. {error}.")  # fmt: skip


def sentence(error: Exception, arguments: Sequence[str] = ()) -> str | None:
    """What a person needs to know; None for an error that is no person's but the code's."""
    from tinyfusion_pl.artifacts import ArtifactError

    cause: BaseException = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    missing = re.search(r"Missing mandatory value: (\S+)", str(cause))
    if isinstance(cause, OmegaConfBaseException) and missing:
        return f"{missing[1]} has no value. Give one: {missing[1]}=VALUE."
    if sweep := re.match(r"Ambiguous value for argument '(.*?)'\n1\. ", str(cause), re.DOTALL):
        return ambiguous(sweep[1])
    if isinstance(cause, ValueError) and str(cause).startswith("Config group override must be"):
        return _of_group(cause, arguments)
    if isinstance(cause, HydraException):
        return _of_hydra(cause, arguments)
    if isinstance(cause, OSError) and cause.strerror and cause.filename:
        return f"Cannot use {cause.filename}: {cause.strerror}."
    if hasattr(cause, "exit_code"):
        return str(cause)
    if isinstance(
        cause, (ValueError, ArtifactError, FloatingPointError, OSError, OmegaConfBaseException)
    ):
        return _without_worker(cause)
    if (
        type(cause).__name__ == "MisconfigurationException"
    ):  # Lightning's, for a Trainer that this machine cannot run
        return str(cause)
    if cause is not error and isinstance(
        cause, (TypeError, ImportError)
    ):  # a wrong argument, or no such constructor
        key = re.search(r"full_key: (\S+)", str(error))
        return f"{key[1]}: {cause}" if key else str(error)
    return None
