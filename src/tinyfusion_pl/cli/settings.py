"""The door: every setting's type and bounds, before anything is built, written or trained.

Types are the hints of what a ``_target_`` names; those of the settings that make no object, and bounds, are in `schema`.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyfusion_pl.cli.references import (
    REFERENCE,
    TARGET,
    Unresolved,
    get_names,
    home,
    outline,
    raw,
    sharpen,
    words_referred_to,
    written,
)
from tinyfusion_pl.cli.wording import hint, shown, unread

MAX_TOLD = 8
SPECIAL = {TARGET: str, "_partial_": bool, "_recursive_": bool, "_convert_": str, "_args_": list}


def check_complete(node: DictConfig | ListConfig) -> None:
    """Read every value, also behind references, so that a missing one is found (Hydra leaves it out of a partial)."""
    for key in get_names(node):
        if OmegaConf.is_config(value := node[key]):
            check_complete(value)


def checked(cfg: DictConfig) -> DictConfig:
    """A copy of `cfg` in which every setting has its type: whole floats are integers where integers are meant.

    Raises:
        ValueError: for settings of another type, out of bounds, or that nothing reads; names each by its key.
    """
    cfg = copy.deepcopy(cfg)
    door = _Door(cfg)
    door.check()
    if door.problems:
        told = list(dict.fromkeys(door.problems.values()))
        more = (
            [f"({len(told) - MAX_TOLD} more settings are wrong.)"] if len(told) > MAX_TOLD else []
        )
        raise ValueError("\n".join([*told[:MAX_TOLD], *more]))
    return cfg


class _Door:
    """One walk over a configuration."""

    def __init__(self, cfg: DictConfig) -> None:
        # Not at the top: they import what a configuration names, and `--help` needs none of it.
        from tinyfusion_pl.cli import kinds, schema, targets

        self.kinds, self.schema, self.targets = kinds, schema, targets
        self.cfg = cfg
        self.problems: dict[str, str] = {}  # by key

    def check(self) -> None:
        self.names()
        if set(self.cfg) >= self.schema.IS_MAIN:
            self.plain(self.cfg, "", self.schema.MAIN)
            self.task()
        else:  # a configuration of someone's own
            for name in ("name", "seed", "run_dir"):
                if name in self.cfg.keys():
                    self.value(self.cfg, name, name, self.schema.MAIN.settings[name])
            self.inside(self.cfg, "")

    def tell(self, key: str, problem: str) -> None:
        self.problems.setdefault(key, problem)

    # -- settings that make no object ---------------------------------------------------------------------------------------------------
    def plain(self, node: DictConfig, key: str, schema: Any) -> None:
        for name in node:
            full = f"{key}.{name}" if key else str(name)
            kind = schema.settings.get(name)
            if kind is None:
                if key or (name != "hydra" and name not in self.referred_to):
                    inner = raw(node, name)
                    while isinstance(inner, DictConfig) and len(inner) == 1:  # ++a.b=1 adds both
                        (last,) = inner
                        full, inner = f"{full}.{last}", raw(inner, last)
                    self.tell(
                        full, unread(full, schema.settings, "is no setting of this configuration")
                    )
            elif not isinstance(kind, self.schema.Plain):
                self.value(node, name, full, kind)
            elif isinstance(inner := raw(node, name), DictConfig):
                self.plain(inner, full, kind)
            else:
                self.tell(
                    full, f"{full} is {shown(inner)}; give a mapping ({', '.join(kind.settings)})."
                )

    def names(self) -> None:
        for key, check in (
            ("name", self.schema.check_name),
            ("run_dir", self.schema.check_run_dir),
        ):
            if (
                key in self.cfg.keys()
                and isinstance(value := raw(self.cfg, key), str)
                and "${" not in value
                and value != "???"
            ):
                try:
                    check(key, value)
                except ValueError as error:
                    self.tell(key, str(error))

    def task(self) -> None:
        """What a task takes is what the rest of the configuration says: only that is in a run's identity."""
        task = raw(self.cfg, "task")
        if not isinstance(task, DictConfig):
            return
        for name in task:
            if name not in (
                "stages",
                "overrides",
                "run_dir",
                "settings",
                *SPECIAL,
            ) and not OmegaConf.is_interpolation(task, name):
                self.tell(f"task.{name}", f"task.{name} is {shown(raw(task, name))}; a task takes it from the rest of the configuration. "
                                          f"Leave it out and set {name} there.")  # fmt: skip
        model = raw(self.cfg, "model")
        if task.get(TARGET) == self.schema.NEW_MODEL and isinstance(model, DictConfig):
            for name in set(model) - self.schema.OF_NEW_MODEL:
                if model[name] not in (None, False):
                    self.tell(f"model.{name}", f"model.{name} is {shown(model[name])}, but a new model is made from model.name alone. Give "
                                               f"+task.overrides.{name}={shown(model[name])} instead.")  # fmt: skip

    @cached_property
    def referred_to(self) -> set[str]:
        return words_referred_to(self.cfg)

    # -- settings that make objects -----------------------------------------------------------------------------------------------------
    def value(self, node: DictConfig | ListConfig, name: Any, key: str, kind: Any) -> None:
        """Check one setting, and what is inside it."""
        if OmegaConf.is_missing(node, name):
            return
        refers = OmegaConf.is_interpolation(node, name)
        if (
            refers
            and not REFERENCE.fullmatch(written(node, name))
            and kind.takes(lambda part: part is str)
        ):
            return  # a text with references in it is a text; to read it may take the hash of everything
        value = self.resolved(node, name, key)
        if isinstance(value, Unresolved):
            return
        plain = outline(value)
        try:
            found = kind.check(plain)
        except self.kinds.WrongKind as error:
            key = ".".join([key, *map(str, error.path)])
            where = home(self.cfg, key)
            taken = f" ({key} takes it)" if where != key else ""
            if (
                where == key or where not in self.problems
            ):  # what is wrong where it stands says more
                self.problems[where] = (
                    f"{where} is {shown(error.value)}{taken}; {error}.{hint(error.value, error.kind)}"
                )
            return
        if refers:  # its settings are looked at where it stands
            self.fits(value, home(self.cfg, key), kind)
            return
        if isinstance(value, DictConfig) and TARGET in value:
            self.object(value, key, kind)
            return
        if isinstance(value, (DictConfig, ListConfig)):
            self.inside(value, key, kind)
        sharpen(node, name, plain, found)

    def inside(self, node: DictConfig | ListConfig, key: str, kind: Any = None) -> None:
        """Objects in lists and mappings that make none themselves."""
        inner = None if kind is None else kind.of_items()
        for name in get_names(node):
            full = f"{key}.{name}" if key else str(name)
            child = raw(node, name)
            if isinstance(child, DictConfig) and TARGET in child:
                self.object(child, full, inner)
            elif isinstance(child, (DictConfig, ListConfig)):
                self.inside(child, full, inner)

    def object(self, node: DictConfig, key: str, kind: Any) -> None:
        """An object: its class, and each of its arguments."""
        name = self.resolved(node, TARGET, f"{key}.{TARGET}")
        if isinstance(name, Unresolved):
            return
        try:
            target = self.targets.locate(name) if isinstance(name, str) else None
        except ValueError as error:
            self.tell(
                f"{key}.{TARGET}",
                f"{key}.{TARGET}: {error}. Give the full name of a class or function.",
            )
            return
        if target is None:
            self.tell(
                f"{key}.{TARGET}",
                f"{key}.{TARGET} is {shown(name)}; give the full name of a class or function.",
            )
            return
        self.fits(node, key, kind)
        parameters = self.targets.get_parameters(target, given=node)
        self.arguments(node, key, parameters, of=_full_name(target))
        if not node.get("_partial_") and "_args_" not in node:
            for each in parameters.required:
                if each not in node.keys():  # a missing value is no member, but a key
                    self.tell(
                        f"{key}.{each}", f"{key}.{each} has no value. Give one: {key}.{each}=VALUE."
                    )

    def fits(self, value: Any, key: str, kind: Any) -> None:
        """Whether the object that `value` describes is of the kind that is meant."""
        if not isinstance(value, DictConfig) or not isinstance(value.get(TARGET), str):
            return
        try:
            target = self.targets.locate(value[TARGET])
        except ValueError:
            return  # told where it stands
        if problem := self.kinds.misfit(target, kind, partial=value.get("_partial_") is True):
            self.tell(key, f"{key}{problem.format(key=key)}")

    def arguments(self, node: DictConfig, key: str, parameters: Any, *, of: str) -> None:
        allowed = list(parameters.hints)
        for name in node:
            full = f"{key}.{name}"
            if name in SPECIAL:
                self.value(node, name, full, self.kinds.Kind(SPECIAL[name]))
            elif name in self.schema.GIVEN.get(key, ()):
                self.tell(
                    full,
                    f"{full} is {shown(raw(node, name))}, but it is set by what uses it. Leave it out.",
                )
            elif name in allowed:
                self.value(
                    node, name, full, self.schema.get_kind(name, parameters.hints[name], target=of)
                )
                if name == "sampling" and of.startswith("tinyfusion_pl."):
                    self.sampling(raw(node, name), full)
            elif parameters.open:
                self.value(node, name, full, self.kinds.Kind(Any))
                if (value := raw(node, name)) != value:
                    self.tell(full, f"{full} is nan; give a value, or leave it out.")
            else:
                self.tell(full, unread(full, allowed, f"is no setting of {of.rpartition('.')[2]}"))

    def sampling(self, node: Any, key: str) -> None:
        """The options of the objective's ``sample``."""
        objective = OmegaConf.select(self.cfg, "objective")
        if (
            not isinstance(node, DictConfig)
            or not isinstance(objective, DictConfig)
            or not isinstance(objective.get(TARGET), str)
        ):
            return
        try:
            target = self.targets.locate(objective._target_)
        except ValueError:
            return
        options = getattr(target, "sampling_options", None)
        if options is None:
            return
        parameters = self.targets.get_options(options)
        allowed = list(parameters.hints)
        unknown = [name for name in node if name not in allowed]
        if len(unknown) > 1:  # not misspelt, but of another objective's sampler
            self.tell(key, f"{key} has {', '.join(map(str, unknown))}, which sampling from {target.__name__} does not take; it takes "
                           f"{', '.join(allowed)}. Choose a sampler that goes with the objective: sampler@{key}=NAME.")  # fmt: skip
            return
        self.arguments(node, key, parameters, of=_full_name(target))

    def resolved(self, node: DictConfig | ListConfig, name: Any, key: str) -> Any:
        try:
            return node[name]
        except OmegaConfBaseException as error:
            if (
                not OmegaConf.is_missing(node, name)
                and "hydra" not in str(written(node, name))
                and "Missing" not in str(error)
            ):
                self.tell(
                    key,
                    f"{key} refers to {written(node, name)}, which cannot be read: {str(error).splitlines()[0]}.",
                )
            return Unresolved()


def _full_name(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
