"""The configuration of another library's model after the cut, so that the library itself builds the shallow model from it.

diffusers and transformers build a model from its config. Which settings hold the depth of a stack is not guessed from their names: the
settings that fit are tried, the model is built from them on the meta device (no memory, no weights), and its keys and shapes must be those
of the cut model. Lists of indices and of one entry a layer follow the kept blocks. Nothing here imports a library: their models are known
by their methods.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tinyfusion_pl.pruning.adapter_state import is_adapter_key
from tinyfusion_pl.pruning.blocks import get_module, get_stack, split_path, unwrap
from tinyfusion_pl.pruning.config_values import Kept, choices, leaves, replaced
from tinyfusion_pl.pruning.known_models import known_fixed_blocks

log = logging.getLogger(__name__)
MAX_BUILDS = 200  # of one stack; each takes some hundredths of a second
Shapes = dict[str, tuple[int, ...]]


@dataclass
class ConfigChange:
    """What makes the config of one library model that of its cut: settings by path, and plain attributes by module."""

    root: str
    settings: dict[tuple, Any] = field(default_factory=dict)
    attributes: list[tuple[str, str, Any]] = field(
        default_factory=list
    )  # module in the uncut model, name, value
    reason: str | None = None  # why there is none


# -- one interface to the libraries' configs ---------------------------------------------------------------------------------------
def is_library_model(module: nn.Module) -> bool:
    """Whether `module` is built from a config that it carries: a model of diffusers or transformers."""
    return _is_diffusers(module) or _is_transformers(module)


def _is_diffusers(module: nn.Module) -> bool:
    return hasattr(module, "register_to_config") and hasattr(module, "_internal_dict")


def _is_transformers(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "to_dict") and hasattr(
        type(module), "_from_config"
    )


def settings_of(module: nn.Module) -> dict[tuple, Any]:
    """Every setting of the config of `module` by its path in it."""
    return dict(leaves(dict(module.config) if _is_diffusers(module) else module.config))


def build_from(module: nn.Module, changes: Mapping[tuple, Any]) -> nn.Module:
    """A model of the class of `module` on the meta device, its config with `changes`."""
    with _quietly(), torch.device("meta"):
        if _is_diffusers(module):
            config = dict(module.config)
            return type(module).from_config(replaced(config, changes))
        return type(module)(replaced(copy.deepcopy(module.config), changes))


def write_settings(module: nn.Module, changes: Mapping[tuple, Any]) -> None:
    """Put `changes` into the config of `module`, in place."""
    if _is_diffusers(module):
        config = replaced(dict(module.config), changes)
        module.register_to_config(**{path[0]: config[path[0]] for path in changes})
    else:
        replaced(module.config, changes)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the libraries' remarks on settings that a try leaves unused, and without moving the random state."""
    state, level = torch.get_rng_state(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        torch.set_rng_state(state)


def library_root(model: nn.Module, path: str) -> str | None:
    """Path of the outermost library model on the way to the stack at `path`; None where there is none."""
    parts = split_path(path)[0].split(".")
    for i in range(len(parts) + 1):
        owner = ".".join(parts[:i])
        if is_library_model(get_module(model, owner)):
            return owner
        if owner == split_path(path)[0]:
            break
    return None


# -- comparing models ---------------------------------------------------------------------------------------------------------------
def plain_shapes(model: nn.Module) -> Shapes:
    """Shape by key of the state dict, without compiling wrappers and adapters."""
    return {
        key.replace("_orig_mod.", "").replace(".base_layer.", "."): tuple(value.shape)
        for key, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and not is_adapter_key(key)
    }


def config_mismatch(model: nn.Module) -> str | None:
    """Why the config of `model` does not describe it, in one clause; None when it does."""
    return _rebuilt(model)[1]


def _rebuilt(model: nn.Module) -> tuple[nn.Module | None, str | None]:
    """The model that the config of `model` describes, and why it is another one."""
    try:
        built = build_from(model, {})
    except Exception as error:  # whatever a library's constructor raises
        return (
            None,
            f"{type(model).__name__} cannot be built from its config on the meta device ({error})",
        )
    return built, _difference(plain_shapes(built), plain_shapes(model))


def _difference(built: Shapes, wanted: Shapes) -> str | None:
    if keys := sorted(built.keys() ^ wanted.keys()):
        where = "only the model has" if keys[0] in wanted else "only its config gives"
        return f"{where} {keys[0]}"
    for key, shape in wanted.items():
        if built[key] != shape:
            return f"{key} is {shape} in the model and {built[key]} by its config"
    return None


def _renamed(name: str, kept: Mapping[str, Kept]) -> str | None:
    """The name of a parameter or module after the cut; None for what the cut takes."""
    for path, blocks in kept.items():
        owner, joined = split_path(path)
        start = 0
        for part in joined.split("+"):
            prefix = f"{owner}.{part}." if owner else f"{part}."
            if name.startswith(prefix):
                index, _, rest = name.removeprefix(prefix).partition(".")
                if index.isdigit():
                    new = blocks.new_index(int(index) + start)
                    return None if new is None else f"{prefix}{new}{'.' if rest else ''}{rest}"
        # a stack of several joined lists is one of this project's models, which state their depth themselves
    return name


def _attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {
            k: v
            for k, v in vars(module).items()
            if not k.startswith("_") and k != "training" and _is_plain(v)
        }
        for name, module in model.named_modules()
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


# -- finding the change -------------------------------------------------------------------------------------------------------------
def find_change(
    model: nn.Module, root: str, kept_blocks: Mapping[str, Sequence[int]]
) -> ConfigChange:
    """The change of the config of the library model at `root` for the cut of its stacks `kept_blocks` (paths from `model` on)."""
    owner = get_module(model, root)
    kept = {
        path.removeprefix(f"{root}.") if root else path: Kept(
            len(get_stack(model, path)), tuple(blocks)
        )
        for path, blocks in kept_blocks.items()
    }
    dense, reason = _rebuilt(owner)
    if reason is not None:
        return ConfigChange(
            root, reason=f"its config does not describe it even before the cut: {reason}"
        )
    search = _Search(owner, dense)
    settings: dict[tuple, Any] = {}
    for path, blocks in kept.items():
        change = search.solve({path: blocks})
        if change is None:
            settings = {}
            break
        settings |= change
    if not settings or search.try_settings(settings, kept) is not None:
        joint = search.solve(kept) if len(kept) > 1 else None
        if joint is None:
            return ConfigChange(root, reason=search.reason)
        settings = joint
    search.try_settings(settings, kept)
    return ConfigChange(root, settings, search.attributes)


class _Search:
    """Tries changes of the config of `owner` until the model built from it is that of a cut."""

    def __init__(self, owner: nn.Module, dense: nn.Module) -> None:
        self.owner, self.settings = owner, settings_of(owner)
        self.shapes, self.plain = plain_shapes(dense), _attributes(dense)
        self.closest: str | None = None  # why the first change that was tried does not fit
        self.attributes: list[tuple[str, str, Any]] = []

    def solve(self, kept: Mapping[str, Kept]) -> dict[tuple, Any] | None:
        """The first change that fits; ones with fewer settings come first. Remembers why the closest did not fit."""
        kept = {path: blocks for path, blocks in kept.items() if not blocks.is_whole}
        if not kept:
            return {}
        depths = [self.depth_settings(path, blocks.depth) for path, blocks in kept.items()]
        for change in itertools.islice(
            choices(self.settings, list(kept.values()), depths), MAX_BUILDS
        ):
            if (reason := self.try_settings(change, kept)) is None:
                return change
            if self.closest is None:
                told = ", ".join(
                    f"{'.'.join(map(str, path))}={value}" for path, value in change.items()
                )
                self.closest = f"with {told} it is another model ({reason})"
        return None

    @property
    def reason(self) -> str:
        return self.closest or "no setting of its config holds the depth of this stack alone"

    def depth_settings(self, path: str, depth: int) -> list[tuple]:
        """Settings of the old depth that make the stack longer or shorter; found by trying each."""
        found = []
        for setting, value in self.settings.items():
            if type(value) is int and value == depth:
                if any(self._length(path, {setting: new}) == new for new in (depth + 1, depth - 1)):
                    found.append(setting)
        return found

    def _length(self, path: str, change: Mapping[tuple, Any]) -> int | None:
        try:
            return len(get_stack(build_from(self.owner, change), path))
        except (
            Exception
        ):  # whatever a library's constructor raises: lists by layer may not go with another depth
            return None

    def try_settings(self, change: Mapping[tuple, Any], kept: Mapping[str, Kept]) -> str | None:
        """Why the model built with `change` is not that of the cut; None when it is."""
        try:
            built = build_from(self.owner, change)
        except (
            Exception
        ) as error:  # whatever a library's constructor raises for settings that do not go together
            return str(error)
        wanted = {
            new: shape
            for name, shape in self.shapes.items()
            if (new := _renamed(name, kept)) is not None
        }
        if (reason := _difference(plain_shapes(built), wanted)) is not None:
            return reason
        return self._compare_attributes(_attributes(built), kept, change)

    def _compare_attributes(
        self, built: dict[str, dict[str, Any]], kept: Mapping[str, Kept], change: Mapping
    ) -> str | None:
        """Plain attributes of the kept blocks must stay what they are, but for the index of the block."""
        found = []
        for name, old in self.plain.items():
            new_name = _renamed(name, kept)
            if new_name is None or new_name not in built:
                continue
            indices = _indices(name, new_name)
            for key, value in old.items():
                new = built[new_name].get(key, value)
                if new == value and type(new) is type(value):
                    continue
                in_block = any(
                    name.startswith(
                        f"{split_path(path)[0]}.".lstrip(".") + split_path(path)[1] + "."
                    )
                    for path in kept
                )
                if (
                    in_block
                    and "drop" not in f"{name}.{key}".lower()
                    and (value, new) not in indices
                ):
                    return f"{name}.{key} is {value!r}, and {new!r} by that config"
                found.append((name, key, new))
        self.attributes = found
        return None


def _indices(old: str, new: str) -> list[tuple[int, int]]:
    return [
        (int(a), int(b))
        for a, b in zip(old.split("."), new.split("."))
        if a.isdigit() and b.isdigit()
    ]


# -- what surgery and plans ask ------------------------------------------------------------------------------------------------------
def config_changes(
    model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]
) -> list[ConfigChange]:
    """The changes of the configs of all library models in `model` whose stacks are cut."""
    roots: dict[str, dict[str, Sequence[int]]] = {}
    for path, kept in kept_blocks.items():
        if (root := library_root(model, path)) is not None:
            roots.setdefault(root, {})[path] = kept
    return [find_change(model, root, kept) for root, kept in roots.items()]


def apply_change(model: nn.Module, change: ConfigChange) -> None:
    """Write the settings; plain attributes are the caller's, who knows the modules from before the cut."""
    if change.reason is None:
        write_settings(get_module(model, change.root), change.settings)


def check_library_config(model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]) -> str | None:
    """Find out, before any training and without touching `model`, whether its library can build the shallow model.

    Returns:
        None when the model states its depth, one of this project's too; else a sentence on why it cannot, and what is saved.

    Raises:
        ValueError: when a block is dropped that has to stay.
    """
    check_fixed_blocks(model, kept_blocks)
    stated = [path for path in kept_blocks if _states_itself(model, path)]
    changes = config_changes(
        model, {path: kept for path, kept in kept_blocks.items() if path not in stated}
    )
    reasons = [
        f"{type(get_module(model, c.root)).__name__} cannot state its depth: {c.reason}"
        for c in changes
        if c.reason
    ]
    if others := [p for p in kept_blocks if p not in stated and library_root(model, p) is None]:
        reasons.append(
            f"{type(get_module(model, split_path(others[0])[0])).__name__} has no config of diffusers or transformers that "
            "would state its depth"
        )
    if not reasons:
        return None
    return f"{'; '.join(reasons)}. The shallow model is saved as a state dict with its record, which load_shallow(path, model=...) reads."


def _states_itself(model: nn.Module, path: str) -> bool:
    owner, name = split_path(path)
    return name in (getattr(get_module(model, owner), "STACKS", None) or ())


def check_fixed_blocks(model: nn.Module, kept_blocks: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError where a block is dropped that has to stay."""
    for path, kept in kept_blocks.items():
        if missing := sorted(fixed_blocks(model, path) - set(kept)):
            raise ValueError(
                f"kept_blocks of '{path}' is {list(kept)}, but {missing} must stay: {type(_owner(model, path)).__name__} builds "
                "or runs them unlike the others. Keep them."
            )


def _owner(model: nn.Module, path: str) -> nn.Module:
    return get_module(model, split_path(path)[0])


def fixed_blocks(model: nn.Module, path: str) -> frozenset[int]:
    """Blocks of the stack at `path` that always stay.

    Those known of the class, and a first or last block with other parameters than its neighbors when no config describes the model without
    it (SD3's last block, ``context_pre_only``), though one does without another block.
    """
    if _states_itself(model, path) or (root := library_root(model, path)) is None:
        return frozenset()
    owner_path, name = split_path(path)
    known = known_fixed_blocks(get_module(model, owner_path), name)
    stack = get_stack(model, path)
    n, shapes = len(stack), [plain_shapes(unwrap(block)) for block in stack]
    if n < 3 or known:
        return known
    ends = [i for i, neighbor in ((0, 1), (n - 1, n - 2)) if shapes[i] != shapes[neighbor]]

    def describes(without: int) -> bool:
        return (
            find_change(model, root, {path: [i for i in range(n) if i != without]}).reason is None
        )

    ordinary = next((i for i in range(1, n - 1) if describes(i)), None) if ends else None
    return frozenset(i for i in ends if ordinary is not None and not describes(i))
