"""The entry point: runs a command such as ``compare``, or a task that Hydra configures.

Rerun the same command to resume; each configuration gets its own run folder.
"""

from __future__ import annotations

import copy
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tinyfusion_pl.cli.arms import record_arm
from tinyfusion_pl.cli.errors import ReportedError, printable_warnings, report, sentence
from tinyfusion_pl.cli.naming import named
from tinyfusion_pl.cli.overrides import check_added, expand_home, keep_escaped, readable
from tinyfusion_pl.cli.paths import absolute_path
from tinyfusion_pl.cli.processes import as_single_run, is_first_process, process
from tinyfusion_pl.cli.renamed import rename_overrides, rename_settings
from tinyfusion_pl.cli.resolvers import register
from tinyfusion_pl.cli.run_identity import (
    CONFIG,
    check_folder,
    forget_config,
    write_config,
)
from tinyfusion_pl.cli.settings import check_complete, checked
from tinyfusion_pl.cli.sweeps import SWEEP, check_single, check_sweep, is_arm
from tinyfusion_pl.preemption import EXIT_CODE, Preempted, preemptible
from tinyfusion_pl.printable import for_terminal

# Command -> function of strings, whose return value is printed.
COMMANDS = {
    "compare": "tinyfusion_pl.report:compare",
    "export": "tinyfusion_pl.models.export:export",
}
register(COMMANDS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return its exit code.

    Exit codes: 0 success; 1 error, reported in one sentence on stderr; 2 wrong usage; 3 training
    stopped before its last step; 75 stopped by SIGTERM or SIGUSR1; 130 Ctrl-C. After 3 and 75,
    rerun the same command to resume. ``TINYFUSION_TRACEBACK=1`` or ``hydra.verbose=true`` prints
    the traceback of an error.

    Args:
        argv: Arguments without the program's name; None: those of this process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 beside newer torch
    try:
        if arguments and "=" not in arguments[0] and not arguments[0].startswith(("-", "+", "~")):
            return _run_command(*arguments)
        # With HYDRA_FULL_ERROR Hydra raises its errors instead of printing them.
        arguments = readable(rename_overrides(arguments))
        with (
            preemptible(),
            process([sys.argv[0], *arguments], HYDRA_FULL_ERROR="1"),
            printable_warnings(),
        ):
            check_sweep(arguments)
            _run_task()
    except SystemExit as stop:  # --help, an unknown flag, a task that failed
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt as stop:
        preempted = isinstance(stop, Preempted)
        if is_first_process():
            print(
                f"\n{stop if preempted else 'Interrupted. Rerun the same command to resume.'}",
                file=sys.stderr,
            )
        return EXIT_CODE if preempted else 130
    except Exception as error:
        return report(error, arguments)
    return 0


def _run_command(command: str, *arguments: str) -> int:
    if command not in COMMANDS:
        return _usage(
            f"Unknown command {command!r}; available commands: {', '.join(COMMANDS)}. Write "
            "settings as KEY=VALUE, for example task=recover; --help lists the groups."
        )
    module, name = COMMANDS[command].split(":")
    function = getattr(import_module(module), name)
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        parameters = inspect.signature(function).parameters.values()
        names = (
            each.name.upper() if each.default is each.empty else f"[{each.name.upper()}]"
            for each in parameters
        )
        return _usage(f"Usage: tinyfusion {command} {' '.join(names)}")
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
            check_single(job.sweeper)
            result = run(cfg, run_dir)
            if is_arm(job) and is_first_process():
                _record_arm(job, run_dir)
            return result
        print(f"job {job.job.num}: {' '.join(job.overrides.task)} -> {run_dir}", flush=True)
        with process(
            [sys.argv[0], *as_single_run(sys.argv[1:], job)],
            **{SWEEP: absolute_path(job.sweep.dir)},
        ):
            result = run(cfg, run_dir)
        _record_arm(job, run_dir)
        return result
    except Exception as error:
        exit_code = report(error)
        if is_arm(job) and is_first_process():
            message = for_terminal(sentence(error) or repr(error))
            _record_arm(job, run_dir, error=message)
            if not sweeping:
                _report_failed_arm(cfg, run_dir, message)
        _remove_empty(run_dir)
        _remove_empty(Path.cwd() / str(job.run.dir))  # as written: a/../b makes both
        if sweeping:
            raise ReportedError from error  # the sweep's other jobs still run
        raise SystemExit(exit_code) from None


def _record_arm(job: HydraConf, run_dir: Path, *, error: str | None = None) -> None:
    record_arm(
        sweep_dir=Path(job.sweep.dir),
        run_dir=run_dir,
        overrides=job.overrides.task,
        error=error,
    )


def _report_failed_arm(cfg: DictConfig, run_dir: Path, message: str) -> None:
    """Report to W&B why an arm of its sweep failed before it logged anything."""
    with suppress(Exception):  # the logger itself may be what failed
        tracker = hydra.utils.instantiate(cfg.logger.factory, _convert_="all")
        if hasattr(tracker, "fail"):
            tracker.fail(run_dir, message)


def _remove_empty(run_dir: Path) -> None:
    """Remove `run_dir` and its parents, which Hydra made, as far as they are empty."""
    here = Path.cwd()
    for folder in (run_dir, *run_dir.parents):
        if folder == here or folder in here.parents:
            return
        with suppress(OSError):  # not empty
            folder.rmdir()


def run(cfg: DictConfig, run_dir: Path) -> Any:
    """Instantiate ``cfg.task``, call it with `run_dir` and return its result.

    ``config.yaml`` is written in between, so an invalid configuration writes nothing. A task that
    takes ``begin`` calls it once its own checks have passed; ``config.yaml`` is written then.

    Raises:
        ValueError: a value is missing or invalid, or `run_dir` belongs to another configuration.
        ArtifactError: another process is running in `run_dir`.
    """
    from tinyfusion_pl.locks import sole_writer  # imports torch, which --help does not need

    # The stages' progress lines replace Lightning's. Importing Lightning sets the level of its
    # parent logger to INFO, so that one is set again below.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    rename_settings(cfg)
    check_added(cfg)
    expand_home(cfg)
    cfg = checked(cfg)
    # Processes that the first one launches share the folder that it locks.
    with sole_writer(run_dir, setting="run_dir") if is_first_process() else nullcontext():
        check_folder(run_dir, cfg)
        check_complete(cfg.task)
        # A copy: Hydra resolves references in place, and config.yaml keeps them.
        task = _build(copy.deepcopy(cfg).task)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        is_new = not (run_dir / CONFIG).exists()
        begin = partial(write_config, run_dir, cfg)
        try:
            if "begin" in inspect.signature(task).parameters:
                return _checked_by_itself(task, run_dir=run_dir, begin=begin, cfg=cfg)
            begin()
            return task(run_dir=run_dir)
        except BaseException:
            if is_new:
                forget_config(run_dir)
            raise


def _checked_by_itself(
    task: Callable[..., Any], *, run_dir: Path, begin: Callable[[], None], cfg: DictConfig
) -> Any:
    """Call `task`, which calls `begin` once its own checks have passed.

    An error before that names the key of the setting.
    """
    begun: list[bool] = []

    def mark() -> None:
        begun.append(True)
        begin()

    try:
        return task(run_dir=run_dir, begin=mark)
    except Exception as error:
        if begun or hasattr(error, "exit_code") or (message := named(error, cfg)) is None:
            raise
        raise ValueError(message) from error


def _build(node: DictConfig) -> Any:
    """Instantiate `node`; if several of its parts are invalid, the error names each one.

    Nothing is downloaded to find the further errors.
    """
    root = copy.deepcopy(node._get_root())  # Hydra changes what it builds from
    keep_escaped(node._get_root())
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except Exception as error:
        # Imports torch, which --help does not need.
        from tinyfusion_pl.models.download import without_download

        sentences = []
        for key in node:
            if OmegaConf.is_config(part := node[key]) and "_target_" in part:
                try:
                    with without_download():
                        hydra.utils.instantiate(part, _convert_="all")
                except Exception as of_part:
                    sentences.append(named(of_part, root) or repr(of_part))
        if len(sentences) < 2:
            sentences = [message] if (message := named(error, root)) is not None else []
        if not sentences or hasattr(error, "exit_code"):
            raise
        raise ValueError("\n".join(sentences)) from error
