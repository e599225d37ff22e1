"""Commands that are not settings go to functions, everything else to Hydra, which runs a task.

A task's run folder is named after its configuration: rerun the same command to resume; each configuration gets its own folder.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from tinyfusion_pl.cli.arms import record_arm
from tinyfusion_pl.cli.errors import Told, printable_warnings, sentence, tell
from tinyfusion_pl.cli.naming import named
from tinyfusion_pl.cli.overrides import check_added, expand_home, keep_escaped, readable
from tinyfusion_pl.cli.processes import as_single_run, is_first_process, process
from tinyfusion_pl.cli.run_identity import (
    CONFIG,
    check_folder,
    compute_hash,
    config_hash,
    forget_config,
    write_config,
)
from tinyfusion_pl.cli.settings import check_complete, checked
from tinyfusion_pl.cli.sweeps import SWEEP, check_single, check_sweep, in_sweep, is_arm
from tinyfusion_pl.preemption import EXIT_CODE, Preempted, preemptible
from tinyfusion_pl.printable import for_terminal

# word -> function of strings; the text that it returns is printed
COMMANDS = {
    "compare": "tinyfusion_pl.report:compare",
    "export": "tinyfusion_pl.models.export:export",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code.

    0: well; 1: an error, told in one sentence on stderr; 2: wrong usage; 3: a training stopped before its last step (rerun
    the same command to resume); 75: SIGTERM or SIGUSR1 (the same); 130: Ctrl-C. ``TINYFUSION_TRACEBACK=1`` or ``hydra.verbose=true``
    shows where an error comes from.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning 2.6 beside newer torch
    try:
        if arguments and "=" not in arguments[0] and not arguments[0].startswith(("-", "+", "~")):
            return _run_command(*arguments)
        # With this variable Hydra raises its errors instead of printing them: all of them are told in one way, below.
        arguments = readable(arguments)
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
        return tell(error, arguments)
    return 0


def _run_command(word: str, *arguments: str) -> int:
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
        words = (
            each.name.upper() if each.default is each.empty else f"[{each.name.upper()}]"
            for each in parameters
        )
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
    arm = (
        partial(
            record_arm, sweep_dir=Path(job.sweep.dir), run_dir=run_dir, overrides=job.overrides.task
        )
        if is_arm(job)
        else None
    )
    try:
        if not sweeping:
            check_single(job.sweeper)
            result = run(cfg, run_dir)
            if arm is not None and is_first_process():
                arm()
            return result
        print(f"job {job.job.num}: {' '.join(job.overrides.task)} -> {run_dir}", flush=True)
        with process(
            [sys.argv[0], *as_single_run(sys.argv[1:], job)],
            **{SWEEP: os.path.abspath(job.sweep.dir)},
        ):
            result = run(cfg, run_dir)
        arm()
        return result
    except Exception as error:
        exit_code = tell(error)
        if arm is not None and is_first_process():
            told = for_terminal(sentence(error) or repr(error))
            arm(error=told)
            if not sweeping:
                _report_failed_arm(cfg, run_dir, told)
        _remove_empty(run_dir)
        _remove_empty(Path.cwd() / str(job.run.dir))  # as written: a/../b makes both
        if sweeping:
            raise Told from error  # the sweep's other jobs still run
        raise SystemExit(exit_code) from None


def _report_failed_arm(cfg: DictConfig, run_dir: Path, told: str) -> None:
    """Give W&B the reason why an arm of its sweep failed before it logged anything: the arm has no run there yet."""
    with suppress(Exception):  # the logger itself may be what failed
        tracker = hydra.utils.instantiate(cfg.logger.factory, _convert_="all")
        if hasattr(tracker, "fail"):
            tracker.fail(run_dir, told)


def _remove_empty(run_dir: Path) -> None:
    """Hydra made the folder and those above it; a run that never began leaves nothing."""
    here = Path.cwd()
    for folder in (run_dir, *run_dir.parents):
        if folder == here or folder in here.parents:
            return
        with suppress(OSError):  # one that holds something stays
            folder.rmdir()


def run(cfg: DictConfig, run_dir: Path) -> Any:
    """Build everything that ``cfg.task`` names, then call it with `run_dir`; returns what it returns.

    ``config.yaml`` is written in between, so a mistake in the configuration leaves nothing behind.
    A task that takes ``begin`` calls it when its own checks have passed: only then ``config.yaml`` is written.

    Raises:
        ValueError: a value is missing or wrong, or `run_dir` holds a run of another configuration.
        ArtifactError: another process runs in `run_dir`.
    """
    from tinyfusion_pl.locks import sole_writer  # imports torch, which --help does not need

    # A stage says in one line what Lightning says in ten. Its import sets the level of its outer logger to INFO: hence twice.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    check_added(cfg)
    expand_home(cfg)
    cfg = checked(cfg)
    # The processes that the first one starts run in the folder that it holds.
    with sole_writer(run_dir, setting="run_dir") if is_first_process() else nullcontext():
        check_folder(run_dir, cfg)
        check_complete(cfg.task)
        task = _build(
            copy.deepcopy(cfg).task
        )  # Hydra resolves references in place; what is written keeps them
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
    """Call `task`, which calls `begin` when its own checks have passed; an error before that tells the key of the setting."""
    begun: list[bool] = []

    def mark() -> None:
        begun.append(True)
        begin()

    try:
        return task(run_dir=run_dir, begin=mark)
    except Exception as error:
        if begun or hasattr(error, "exit_code") or (told := named(error, cfg)) is None:
            raise
        raise ValueError(told) from error


def _build(node: DictConfig) -> Any:
    """Instantiate `node`; where several of its parts cannot be built, the error tells of each, and nothing is downloaded to find out."""
    root = copy.deepcopy(node._get_root())  # Hydra changes what it builds from
    keep_escaped(node._get_root())
    try:
        return hydra.utils.instantiate(node, _convert_="all")
    except Exception as error:
        from tinyfusion_pl.models.download import (
            without_download,
        )  # imports torch, which --help does not need

        sentences = []
        for key in node:
            if OmegaConf.is_config(part := node[key]) and "_target_" in part:
                try:
                    with without_download():
                        hydra.utils.instantiate(part, _convert_="all")
                except Exception as of_part:
                    sentences.append(named(of_part, root) or repr(of_part))
        if len(sentences) < 2:
            sentences = [told] if (told := named(error, root)) is not None else []
        if not sentences or hasattr(error, "exit_code"):
            raise
        raise ValueError("\n".join(sentences)) from error


OmegaConf.register_new_resolver("config_hash", lambda *, _root_: config_hash(_root_), replace=True)
OmegaConf.register_new_resolver(
    "compute_hash", lambda *names, _root_: compute_hash(_root_, *names), replace=True
)
OmegaConf.register_new_resolver("in_sweep", in_sweep, replace=True)
OmegaConf.register_new_resolver(
    "absolute_path", lambda path: os.path.abspath(os.path.expanduser(str(path))), replace=True
)
OmegaConf.register_new_resolver(
    "expand_user", lambda path: os.path.expanduser(str(path)), replace=True
)
OmegaConf.register_new_resolver("words", lambda: ", ".join(COMMANDS), replace=True)
