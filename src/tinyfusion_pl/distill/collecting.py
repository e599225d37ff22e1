"""Collectors of the student's block outputs and the teacher's hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import Tensor, nn

from tinyfusion_pl.distill.hidden_states import BlockOutputs, HiddenStates, Layout
from tinyfusion_pl.distill.pairs import Pairs

Outputs = Mapping[str, Mapping[int, Any]]  # what blocks returned, by stack path and block
Hidden = Mapping[
    str, Mapping[int, tuple[Layout, Mapping[Any, Tensor]]]
]  # hidden states, and where a block's output has them


_Self = TypeVar("_Self", bound="_OfAllStacks")


class _OfAllStacks(ExitStack):
    """Collects from the blocks of several stacks while a model runs."""

    def __init__(self, collectors: Mapping[str, BlockOutputs]) -> None:
        super().__init__()
        self.collectors = collectors

    def __enter__(self: _Self) -> _Self:
        super().__enter__()
        for collector in self.collectors.values():
            self.enter_context(collector)
        return self

    def start(self) -> None:
        """Collect anew."""
        for collector in self.collectors.values():
            collector.found = {}

    def stop(self) -> None:
        """Collect nothing until the next `start`."""
        for collector in self.collectors.values():
            collector.found = None


class StudentOutputs(_OfAllStacks):
    """What the student's paired blocks return while it runs."""

    def __init__(
        self, student: nn.Module, pairs: Pairs, collector: type[BlockOutputs] = BlockOutputs
    ) -> None:
        super().__init__(
            {
                path: collector(student, path, [s for s, _ in of_path])
                for path, of_path in pairs.items()
            }
        )

    def take(self) -> dict[str, dict[int, Any]]:
        """What was collected since the start."""
        return {path: dict(collector.found) for path, collector in self.collectors.items()}


class TeacherStates(_OfAllStacks):
    """The hidden states of the teacher's paired blocks while it runs."""

    def __init__(
        self, teacher: nn.Module, pairs: Pairs, streams: Mapping[str, list[str]] | None = None
    ) -> None:
        given = streams or {}
        super().__init__(
            {
                path: HiddenStates(teacher, path, [t for _, t in of_path], streams=given.get(path))
                for path, of_path in pairs.items()
            }
        )

    def take(self) -> dict[str, dict[int, tuple[Layout, dict[Any, Tensor]]]]:
        """What was collected since the start."""
        taken: dict[str, dict[int, tuple[Layout, dict[Any, Tensor]]]] = {}
        for path, collector in self.collectors.items():
            taken[path] = {}
            for block, states in collector.found.items():
                layout = collector.layouts[block]
                taken[path][block] = (
                    layout,
                    dict(zip(layout.keys, states if isinstance(states, tuple) else (states,))),
                )
        return taken
