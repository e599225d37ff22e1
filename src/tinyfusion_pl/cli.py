"""The command line: words that are no settings go to functions, everything else to Hydra, which runs a task.

``tinyfusion`` and ``python -m tinyfusion_pl`` are the same. A task's run folder is named after its configuration, so
the same command goes on where it was, and another configuration never writes there.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

# Before torch is loaded. OpenMP threads that spin at barriers slow training tenfold as soon as anything else runs on a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# word -> function of strings; the text that it returns is printed
COMMANDS = {
    "compare": "tinyfusion_pl.report:compare",
    "export": "tinyfusion_pl.models.export:export",
}

# Where a run writes and which of its stages run: no part of what is computed, so no part of the folder's name.
NOT_IDENTITY = ("hydra", "run_dir", "paths", "task")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code.

    0: well; 1: an error, told in one sentence on stderr; 2: wrong usage; 130: Ctrl-C. ``TINYFUSION_TRACEBACK=1`` or
    ``hydra.verbose=true`` shows where an error comes from.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 beside newer torch
    try:
        if arguments and "=" not in arguments[0] and not arguments[0].startswith(("-", "+", "~")):
            return _run_word(*arguments)
        # With this variable Hydra raises its errors instead of printing them: all of them are told in one way, below.
        with _process([sys.argv[0], *arguments], HYDRA_FULL_ERROR="1"):
            _run_task()
    except SystemExit as stop:  # --help, an unknown flag, a task that failed
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        if _is_first_process():
            print("\nInterrupted. The same command goes on from where it was.", file=sys.stderr)
        return 130
    except Exception as error:
        return _tell(error)
    return 0


def _run_word(word: str, *arguments: str) -> int:
    if word not in COMMANDS:
        return _usage(
            f"Unknown word {word!r}; known are: {', '.join(COMMANDS)}. Settings are given as key=value, for instance "
            "task=recover, and --help lists them."
        )
    module, name = COMMANDS[word].split(":")
    function = getattr(import_module(module), name)
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        parameters = inspect.signature(function).parameters.values()
        words = (each.name.upper() if each.default is each.empty else f"[{each.name.upper()}]" for each in parameters)
        return _usage(f"Usage: tinyfusion {word} {' '.join(words)}")
    print(function(*arguments))
    return 0


def _usage(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


@hydra.main(version_base="1.3", config_path="pkg://tinyfusion_pl.conf", config_name="main")
def _run_task(cfg: DictConfig) -> Any:
    job = HydraConfig.get()
    run_dir = Path(job.runtime.output_dir)
    sweeping = job.mode == RunMode.MULTIRUN
    try:
        if not sweeping:
            return run(cfg, run_dir)
        print(f"job {job.job.num}: {' '.join(job.overrides.task)} -> {run_dir}", flush=True)
        with _process([sys.argv[0], *_as_single_run(sys.argv[1:], job)]):
            return run(cfg, run_dir)
    except Exception as error:
        exit_code = _tell(error)
        with suppress(OSError):
            run_dir.rmdir()  # Hydra made it; a run that never began leaves nothing
        if sweeping:
            raise _Told from error  # the sweep's other jobs still run
        raise SystemExit(exit_code) from None


def run(cfg: DictConfig, run_dir: Path) -> Any:
    """Build everything that ``cfg.task`` names, then call it with `run_dir`; returns what it returns.

    ``config.yaml`` is written in between, so a mistake in the configuration leaves nothing behind.

    Raises:
        ValueError: a value is missing or wrong, or `run_dir` holds a run of another configuration.
    """
    # A stage says in one line what Lightning says in ten. Its import sets the level of its outer logger to INFO: hence twice.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    _check_added(cfg)
    _check_folder(run_dir, cfg)
    _check_complete(cfg.task)
    task = _build(copy.deepcopy(cfg).task)  # Hydra resolves references in place; what is written keeps them
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    _write_config(run_dir, cfg)
    return task(run_dir=run_dir)


def _build(node: DictConfig) -> Any:
    """Instantiate `node`; where several of its parts cannot be built, the error tells of each, and nothing is downloaded to find out."""
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except Exception as error:
        from tinyfusion_pl.models.download import without_download  # imports torch, which --help does not need

        sentences = []
        for key in node:
            if OmegaConf.is_config(part := node[key]) and "_target_" in part:
                try:
                    with without_download():
                        hydra.utils.instantiate(part, _convert_="all")
                except Exception as of_part:
                    sentences.append(_sentence(of_part) or repr(of_part))
        if len(sentences) < 2:
            raise
        raise ValueError("\n".join(sentences)) from error


# --- the run folder and its configuration -----------------------------------------------------------------------------


def identity(cfg: DictConfig) -> dict[str, Any]:
    """What decides a run's numbers, as plain data: everything but `NOT_IDENTITY`.

    A reference to a single value becomes that value; one to a whole group, or to where the run is, stays as written.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    kept = OmegaConf.create({key: value for key, value in raw.items() if key not in NOT_IDENTITY})
    _settle(kept)
    return OmegaConf.to_container(kept, resolve=False)


def config_hash(cfg: DictConfig) -> str:
    """8 hexadecimal digits of the SHA-256 over the `identity` of `cfg`."""
    return hashlib.sha256(_canonical(identity(cfg)).encode()).hexdigest()[:8]


def _settle(node: DictConfig | ListConfig) -> None:
    for key, written in _items(OmegaConf.to_container(node, resolve=False)):
        if OmegaConf.is_interpolation(node, key):
            with suppress(OmegaConfBaseException):  # it refers to what was taken out
                if "${hydra:" not in written and not OmegaConf.is_config(value := node[key]):
                    node[key] = value
        elif isinstance(written, (dict, list)):
            _settle(node[key])


def _items(container: dict | list) -> Iterator[tuple[Any, Any]]:
    yield from container.items() if isinstance(container, dict) else enumerate(container)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _flat(container: dict | list, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in _items(container):
        if isinstance(value, (dict, list)) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _canonical(value)


def _check_folder(run_dir: Path, cfg: DictConfig) -> None:
    file = run_dir / "config.yaml"
    if not file.exists():
        return
    try:
        there, here = (dict(_flat(identity(config))) for config in (OmegaConf.load(file), cfg))
    except Exception as error:
        raise ValueError(f"{file} is not a readable configuration ({error}). Give another run_dir.") from error
    differing = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    if differing:
        shown = "; ".join(f"{key} is {there.get(key, 'not set')} there and {here.get(key, 'not set')} here"
                          for key in differing[:3])  # fmt: skip
        more = f"; {len(differing) - 3} more differ" if len(differing) > 3 else ""
        raise ValueError(
            f"{run_dir} holds a run of another configuration ({shown}{more}). Give another run_dir=PATH, or none: each "
            "configuration then gets its own folder."
        )


def _write_config(run_dir: Path, cfg: DictConfig) -> None:
    from tinyfusion_pl.artifacts import write_text  # imports torch, which --help does not need

    if (run_dir / "config.yaml").exists() or not _is_first_process():
        return
    raw, where = OmegaConf.to_container(cfg, resolve=False), {}
    for key in ("run_dir", "paths"):
        if key in cfg:
            where[key] = OmegaConf.to_container(cfg[key], resolve=True) if OmegaConf.is_config(cfg[key]) else cfg[key]
    whole = {**identity(cfg), "task": raw["task"], **where}
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(whole)))


def _check_added(cfg: DictConfig) -> None:
    """Refuse ``+experimnt=x``: Hydra adds it as a setting that nothing reads, and the default would run."""
    if not HydraConfig.initialized():
        return
    for override in HydraConfig.get().overrides.task:
        key = override.removeprefix("+").partition("=")[0]
        if override.startswith("+") and "." not in key and "@" not in key and key in cfg and not OmegaConf.is_config(cfg[key]):
            raise ValueError(f"There is no configuration group {key!r} to add ({override}). Groups to add are +experiment, +sweep and "
                             "+debug; --help lists the choices.")


def _check_complete(node: DictConfig | ListConfig) -> None:
    """Read every value, also behind references, so that a missing one is found (Hydra leaves it out of a partial)."""
    for key, _ in _items(OmegaConf.to_container(node, resolve=False)):
        if OmegaConf.is_config(value := node[key]):
            _check_complete(value)


OmegaConf.register_new_resolver("config_hash", lambda *, _root_: config_hash(_root_), replace=True)
OmegaConf.register_new_resolver("absolute_path", os.path.abspath, replace=True)
OmegaConf.register_new_resolver("words", lambda: ", ".join(COMMANDS), replace=True)


# --- processes --------------------------------------------------------------------------------------------------------


@contextmanager
def _process(argv: Sequence[str], **environment: str) -> Iterator[None]:
    """Another command line and environment for a while; what distributed training left there goes afterwards, so that
    the next job of a sweep starts processes of its own."""
    argv_before, environment_before = sys.argv, dict(os.environ)
    sys.argv = list(argv)
    os.environ.update(environment)
    try:
        yield
    finally:
        sys.argv = argv_before
        for name in set(os.environ) - set(environment_before):
            del os.environ[name]
        os.environ.update(environment_before)
        distributed = sys.modules.get("torch.distributed")
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()


def _as_single_run(argv: Sequence[str], job: DictConfig) -> list[str]:
    """The command line of this one job of a sweep. Lightning's DDP starts its other processes with ``sys.argv``: with
    the sweep's they would run the whole sweep."""
    overrides = get_args_parser().parse_args(argv).overrides
    flags = [argument for argument in argv if argument not in (*overrides, "-m", "--multirun")]
    of_hydra = [each for each in job.overrides.hydra if not each.startswith(("hydra.mode=", "hydra.sweep"))]
    return [*flags, *job.overrides.task, *of_hydra, "hydra.mode=RUN"]


def _is_first_process() -> bool:
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))


# --- errors -----------------------------------------------------------------------------------------------------------


class _Told(Exception):
    """A job of a sweep failed, and the error was told."""


def _tell(error: Exception) -> int:
    if isinstance(error, _Told):
        return 1
    sentence = _sentence(error)
    verbose = HydraConfig.initialized() and HydraConfig.get().verbose
    if sentence is None or verbose or os.environ.get("TINYFUSION_TRACEBACK") == "1":
        traceback.print_exception(error)
    print(f"error: {sentence or repr(error)}", file=sys.stderr)
    return 1


def _without_worker(error: BaseException) -> str:
    """What an error says, without the traceback that a DataLoader's worker process puts around it."""
    inner = re.search(r"\ACaught (\w+) in DataLoader worker process.*\n(?:[\w.]*\.)?\1: (.*)\Z", str(error), re.DOTALL)
    return inner[2].strip() if inner else str(error)


def _sentence(error: Exception) -> str | None:
    """What a person needs to know; None for an error that is no person's but the code's."""
    from tinyfusion_pl.artifacts import ArtifactError

    cause: BaseException = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    missing = re.search(r"Missing mandatory value: (\S+)", str(cause))
    if isinstance(cause, OmegaConfBaseException) and missing:
        return f"{missing[1]} has no value. Give one: {missing[1]}=VALUE."
    if isinstance(cause, HydraException):
        return "\n".join(str(each) for each in (cause, cause.__cause__) if each is not None)
    if isinstance(cause, OSError) and cause.strerror and cause.filename:
        return f"Cannot use {cause.filename}: {cause.strerror}."
    if isinstance(cause, (ValueError, ArtifactError, FloatingPointError, OSError, OmegaConfBaseException)):
        return _without_worker(cause)
    if type(cause).__name__ == "MisconfigurationException":  # Lightning's, for a Trainer that this machine cannot run
        return str(cause)
    if cause is not error and isinstance(cause, (TypeError, ImportError)):  # a wrong argument, or no such constructor
        key = re.search(r"full_key: (\S+)", str(error))
        return f"{key[1]}: {cause}" if key else str(error)
    return None
