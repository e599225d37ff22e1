"""How errors are reported: users' mistakes in one sentence, bugs with a traceback."""

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


class ReportedError(Exception):
    """A job of a sweep failed, and its error has been reported."""


@contextmanager
def printable_warnings() -> Iterator[None]:
    """Strip control characters from warnings inside the block: they may quote any file name."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda *args, **kwargs: for_terminal(before(*args, **kwargs))
    try:
        yield
    finally:
        warnings.formatwarning = before


def report(error: Exception, arguments: Sequence[str] = ()) -> int:
    """Report `error` of the command line `arguments` on stderr; returns the exit code."""
    if isinstance(error, ReportedError):
        return 1
    message = sentence(error, arguments)
    verbose = HydraConfig.initialized() and HydraConfig.get().verbose
    if message is None or verbose or os.environ.get("TINYFUSION_TRACEBACK") == "1":
        traceback.print_exception(error)
    message = message or repr(error)
    exit_code = getattr(error, "exit_code", None)  # not a failure, for example an unfinished stage
    print(for_terminal(message if exit_code else f"error: {message}"), file=sys.stderr)
    return exit_code or 1


def _without_worker(error: BaseException) -> str:
    """The message of an error, without the traceback that a DataLoader worker wraps it in."""
    inner = re.search(
        r"\ACaught (\w+) in DataLoader worker process.*\n(?:[\w.]*\.)?\1: (.*)\Z",
        str(error),
        re.DOTALL,
    )
    return inner[2].strip() if inner else str(error)


def _of_hydra(error: HydraException, arguments: Sequence[str]) -> str:
    """Hydra's message, with the key of the setting."""
    message = "\n".join(str(each) for each in (error, error.__cause__) if each is not None)
    merged = re.search(r"Error merging override \+*([^=\s]+)=(.*)", message)
    if merged and "Cannot merge DictConfig" in message:
        return (
            f"{merged[1]} is {merged[2]}; give a mapping, or set one of its settings: "
            f"{merged[1]}.NAME=VALUE."
        )
    if unknown := re.match(
        r"Could not override '(.*)'\.\nTo append to your config use \+(.*)\n", message
    ):
        return (
            f"Could not override '{unknown[1]}': the configuration has no such setting; --cfg job "
            "lists all of them. To set an argument that the configuration leaves at its default, "
            f"write +{unknown[2]}."
        )
    return message


def _of_group(error: ValueError, arguments: Sequence[str]) -> str:
    """The message for a group that was set to something other than names."""
    given = [each.lstrip("+").partition("=") for each in arguments]
    names = [
        key
        for key, _, value in given
        if value
        and "." not in key.partition("@")[0]
        and key not in NO_GROUPS
        and (value == "null" or not re.fullmatch(r"[A-Za-z_][\w./-]*", value))
    ]
    package = names[0].rpartition("@")[2] if names else "GROUP"
    return (
        f"{' or '.join(names) or 'A group'}: select a configuration group by name (--help lists "
        f"the names), and set one of its settings with {package}.NAME=VALUE. {error}."
    )


def sentence(error: Exception, arguments: Sequence[str] = ()) -> str | None:
    """The message for the user; None for a bug, which needs a traceback."""
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
    # Lightning's, for a Trainer that this machine cannot run.
    if type(cause).__name__ == "MisconfigurationException":
        return str(cause)
    # A wrong argument, or a target that does not exist.
    if cause is not error and isinstance(cause, (TypeError, ImportError)):
        key = re.search(r"full_key: (\S+)", str(error))
        return f"{key[1]}: {cause}" if key else str(error)
    return None
