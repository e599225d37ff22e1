"""What a long choice has done so far, so that an interrupted one resumes after its last step."""

from __future__ import annotations

import hashlib
import io
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tinyfusion_pl.artifacts import atomic_path
from tinyfusion_pl.preemption import Preempted, deferred, requested
from tinyfusion_pl.selection.structures import Structures

EVERY = 300.0  # seconds between savings, beside those that a signal asks for


class Progress:
    """Keeps the states of a choice's phases in one file.

    Ignores a file that is damaged or belongs to another choice.

    Args:
        path: The file; None: nothing is kept.
        made_from: What decides the choice, beside its settings: texts and numbers.
    """

    def __init__(self, path: Path | None = None, *, made_from: Any = None) -> None:
        self.path, self.made_from, self._saved = path, made_from, time.monotonic()
        self._phases: dict[str, dict[str, Any]] = {}

    def start(self, structures: Structures) -> None:
        """Count costs from here on, and read what an earlier attempt left."""
        self._structures, self._before = structures, structures.num_block_runs
        if self.path is None or not self.path.exists():
            return
        content = self.path.read_bytes()
        if hashlib.sha256(content[64:]).hexdigest().encode() != content[:64]:
            return
        try:
            kept = torch.load(io.BytesIO(content[64:]), weights_only=True)
        except (
            pickle.UnpicklingError
        ):  # of a criterion whose choice holds more than tensors, numbers and texts
            return
        if kept["made_from"] == self.made_from:
            self._phases = kept["phases"]

    def load(self, phase: str) -> dict[str, Any] | None:
        """The last saved state of `phase`; restores the cost counted until then."""
        if (found := self._phases.get(phase)) is None:
            return None
        self._structures.num_block_runs = self._before + found["cost"]
        return found["state"]

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Inside, a signal waits for the next `step`."""
        with deferred():
            yield

    def step(self, phase: str, state: Callable[[], dict[str, Any]]) -> None:
        """Save the state of `phase` from time to time, and on a signal.

        Call it after each step.

        Raises:
            Preempted: when it was asked to.
        """
        signum = requested()
        if signum or time.monotonic() - self._saved >= EVERY:
            self.save(phase, state())
        if signum:
            raise Preempted(signum)

    def save(self, phase: str, state: dict[str, Any]) -> None:
        """Keep `state` of `phase`."""
        self._saved = time.monotonic()
        cost = self._structures.num_block_runs - self._before
        self._phases[phase] = {"cost": cost, "state": state}
        if self.path is None:
            return
        stream = io.BytesIO()
        torch.save({"made_from": self.made_from, "phases": self._phases}, stream)
        with atomic_path(self.path) as temporary:
            content = stream.getvalue()
            temporary.write_bytes(hashlib.sha256(content).hexdigest().encode() + content)

    def delete(self) -> None:
        """Remove the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
