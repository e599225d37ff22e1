"""ARCHITECTURE.md's table of rooms, held against what the files import."""

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tinyfusion_pl"


@dataclass(frozen=True)
class Room:
    floor: int
    may_know: str


def rooms() -> dict[str, Room]:
    """Room -> floor and what it may know; a remark behind a room's name counts for that room alone."""
    page, table = (ROOT / "ARCHITECTURE.md").read_text(), {}
    for floor, names, may_know in re.findall(r"^\| (\d+) \| (.+) \| (.+) \|$", page, re.M):
        for name, remark in re.findall(r"`(\w+)(?:/|\.py)`(?: \((.*?)\))?", names):
            table[name] = Room(int(floor), f"{may_know}, {remark}")
    return table


ROOMS = rooms()


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str, module: str) -> set[str]:
    """Full names of the modules and members that a file of `module`'s package imports, relative imports resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def violations(source: str, *, room: str, module: str) -> list[str]:
    here, found = ROOMS[room], []
    for name in sorted(imported(source, module)):
        top, *rest = name.split(".")
        if top == "tinyfusion_pl":
            there = rest[0] if rest else ""
            if there not in ROOMS:
                found.append(f"{name}: a room imports rooms, not the package's public names")
            elif (
                there != room
                and (room, there) != ("__main__", "cli")
                and ROOMS[there].floor >= here.floor
            ):
                found.append(
                    f"{name}: {there} (floor {ROOMS[there].floor}) is not below {room} (floor {here.floor})"
                )
        elif (
            top in ("lightning", "pytorch_lightning", "lightning_fabric")
            and "Lightning" not in here.may_know
        ):
            found.append(f"{name}: no Lightning in {room}")
        elif top in ("hydra", "omegaconf") and "Hydra" not in here.may_know:
            found.append(f"{name}: no Hydra in {room}")
        elif here.floor <= 4 and top not in sys.stdlib_module_names and top not in here.may_know:
            found.append(
                f"{name}: {room} knows {here.may_know.strip(', ')} and the standard library"
            )
    return found


FILES = sorted(
    file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or file.name != "__init__.py"
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_downward_only(file):
    module = ".".join(("tinyfusion_pl", *file.relative_to(PACKAGE).with_suffix("").parts))
    assert violations(file.read_text(), room=room_of(file), module=module) == []


def test_the_table_names_every_room_on_disk():
    on_disk = {room_of(file) for file in FILES if file.stat().st_size}
    assert on_disk <= set(ROOMS)
    assert {room.floor for room in ROOMS.values()} == {2, 3, 4, 5, 6, 7, 8, 9}


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("import tinyfusion_pl.tasks", "pruning"),
        ("from tinyfusion_pl.modules import Recovery", "callbacks"),
        ("from ..callbacks import Clock", "modules"),
        ("from tinyfusion_pl import MaskLearning", "tasks"),
        ("def f():\n    import lightning.pytorch as pl", "report"),
        ("from hydra.utils import instantiate", "tasks"),
        ("from lightning.pytorch import Trainer", "cli"),
        ("import torchmetrics", "models"),
        ("import numpy", "pruning"),
    ],
)
def test_an_upward_or_foreign_import_is_found(source, room):
    assert len(violations(source, room=room, module=f"tinyfusion_pl.{room}.file")) == 1


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("from tinyfusion_pl.pruning import Pattern", "callbacks"),
        ("from .reading import Run", "report"),
        ("from lightning.pytorch import LightningDataModule", "data"),
        ("from hydra import main\nfrom tinyfusion_pl import tasks", "cli"),
        ("import math, torch", "pruning"),
    ],
)
def test_a_downward_import_is_fine(source, room):
    assert violations(source, room=room, module=f"tinyfusion_pl.{room}.file") == []


def modules() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, for type checkers alone too."""
    names = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(("tinyfusion_pl", *(part for part in parts if part != "__init__")))] = file
    found = {}
    for name, file in names.items():
        imports = imported(
            file.read_text(), f"{name}.__init__" if file.name == "__init__.py" else name
        )
        found[name] = {
            each if each in names else each.rpartition(".")[0] for each in imports
        } & set(names) - {name}
    return found


def test_no_two_modules_import_each_other_in_a_circle():
    left = modules()
    assert len(left) > 200
    while free := {name for name, needed in left.items() if not needed & set(left)}:
        left = {name: needed for name, needed in left.items() if name not in free}
    assert left == {}  # what is in a circle, or imports one that is
