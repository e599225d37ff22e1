"""Validation of all settings before anything is instantiated, written or trained.

Types are the hints of each ``_target_``; `schema` has those of other settings, and bounds.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from tinyfusion_pl.cli.targets import Parameters

MAX_TOLD = 8
SPECIAL = {TARGET: str, "_partial_": bool, "_recursive_": bool, "_convert_": str, "_args_": list}


def check_complete(node: DictConfig | ListConfig) -> None:
    """Read every value, also behind references, to find a missing one by its full key.

    OmegaConf's ``to_container(throw_on_missing=True)`` names only the last part of a key behind a
    reference.
    """
    for key in get_names(node):
        if OmegaConf.is_config(value := node[key]):
            check_complete(value)


def checked(cfg: DictConfig) -> DictConfig:
    """A copy of `cfg` in which each setting has its type: whole floats become integers.

    Raises:
        ValueError: for settings of another type, out of bounds, or that nothing reads; names the
            key of each.
    """
    cfg = copy.deepcopy(cfg)
    validation = _Validation(cfg)
    validation.check()
    if validation.problems:
        problems = list(dict.fromkeys(validation.problems.values()))
        lines = problems[:MAX_TOLD]
        if (num_more := len(problems) - MAX_TOLD) > 0:
            lines.append(f"({num_more} more settings are invalid.)")
        raise ValueError("\n".join(lines))
    return cfg


class _Validation:
    """One walk over a configuration."""

    def __init__(self, cfg: DictConfig) -> None:
        # Imported here: they import what a configuration names, which --help does not need.
        from tinyfusion_pl.cli import kinds, schema, targets

        self.kinds, self.schema, self.targets = kinds, schema, targets
        self.cfg = cfg
        self.problems: dict[str, str] = {}  # by key

    def check(self) -> None:
        self.names()
        if set(self.cfg) >= self.schema.IS_MAIN:
            self.plain(self.cfg, "", self.schema.MAIN)
            self.task()
        else:  # a user's own main configuration
            for name in ("name", "seed", "run_dir"):
                if name in get_names(self.cfg):
                    self.value(self.cfg, name, name, self.schema.MAIN.settings[name])
            self.inside(self.cfg, "")

    def add(self, key: str, problem: str) -> None:
        self.problems.setdefault(key, problem)

    # -- mappings without _target_ -------------------------------------------------------------
    def plain(self, node: DictConfig, key: str, schema: Any) -> None:
        for name in get_names(node):
            full = f"{key}.{name}" if key else name
            kind = schema.settings.get(name)
            if kind is None:
                if key or (name != "hydra" and name not in self.referred_to):
                    inner = raw(node, name)
                    while isinstance(inner, DictConfig) and len(inner) == 1:  # ++a.b=1 adds both
                        (last,) = inner
                        full, inner = f"{full}.{last}", raw(inner, last)
                    self.add(
                        full,
                        unread(full, schema.settings, "is not a setting of this configuration"),
                    )
            elif not isinstance(kind, self.schema.Plain):
                self.value(node, name, full, kind)
            elif isinstance(inner := raw(node, name), DictConfig):
                self.plain(inner, full, kind)
            else:
                self.add(
                    full, f"{full} is {shown(inner)}; give a mapping ({', '.join(kind.settings)})."
                )

    def names(self) -> None:
        for key, check in (
            ("name", self.schema.check_name),
            ("run_dir", self.schema.check_run_dir),
        ):
            if (
                key in get_names(self.cfg)
                and isinstance(value := raw(self.cfg, key), str)
                and "${" not in value
                and value != "???"
            ):
                try:
                    check(key, value)
                except ValueError as error:
                    self.add(key, str(error))

    def task(self) -> None:
        """A task takes its values from the other groups: only those are in a run's identity."""
        task = raw(self.cfg, "task")
        if not isinstance(task, DictConfig):
            return
        for name in get_names(task):
            if name not in (
                "stages",
                "overrides",
                "run_dir",
                "settings",
                *SPECIAL,
            ) and not OmegaConf.is_interpolation(task, name):
                self.add(
                    f"task.{name}",
                    f"task.{name} is {shown(raw(task, name))}, but a task takes its values from "
                    f"the other groups. Omit it and set {name} there.",
                )
        model = raw(self.cfg, "model")
        if task.get(TARGET) == self.schema.NEW_MODEL and isinstance(model, DictConfig):
            for name in set(get_names(model)) - self.schema.OF_NEW_MODEL:
                if model[name] not in (None, False):
                    self.add(
                        f"model.{name}",
                        f"model.{name} is {shown(model[name])}, but task=train creates its model "
                        "from model.name alone. Set "
                        f"+task.overrides.{name}={shown(model[name])} instead.",
                    )

    @cached_property
    def referred_to(self) -> set[str]:
        return words_referred_to(self.cfg)

    # -- objects -------------------------------------------------------------------------------
    def value(self, node: DictConfig | ListConfig, name: Any, key: str, kind: Any) -> None:
        """Check one setting, and those inside it."""
        if OmegaConf.is_missing(node, name):
            return
        refers = OmegaConf.is_interpolation(node, name)
        if (
            refers
            and not REFERENCE.fullmatch(written(node, name))
            and kind.takes(lambda part: part is str)
        ):
            return  # a string; resolving it may require the hash of the whole configuration
        value = self.resolved(node, name, key)
        if isinstance(value, Unresolved):
            return
        plain = outline(value)
        try:
            found = kind.check(plain)
        except self.kinds.KindError as error:
            key = ".".join([key, *map(str, error.path)])
            where = home(self.cfg, key)
            taken = f" (used by {key})" if where != key else ""
            # An error at the key where a value is set says more than one at a reference to it.
            if where == key or where not in self.problems:
                self.problems[where] = (
                    f"{where} is {shown(error.value)}{taken}; "
                    f"{error}.{hint(error.value, error.kind)}"
                )
            return
        if refers:  # its settings are checked where it is set
            self.fits(value, home(self.cfg, key), kind)
            return
        if isinstance(value, DictConfig) and TARGET in value:
            self.object(value, key, kind)
            return
        if isinstance(value, (DictConfig, ListConfig)):
            self.inside(value, key, kind)
        sharpen(node, name, plain, found)

    def inside(self, node: DictConfig | ListConfig, key: str, kind: Any = None) -> None:
        """Check the objects in a list or in a mapping without ``_target_``."""
        inner = None if kind is None else kind.of_items()
        for name in get_names(node):
            full = f"{key}.{name}" if key else str(name)
            child = raw(node, name)
            if isinstance(child, DictConfig) and TARGET in child:
                self.object(child, full, inner)
            elif isinstance(child, (DictConfig, ListConfig)):
                self.inside(child, full, inner)

    def object(self, node: DictConfig, key: str, kind: Any) -> None:
        """Check the class and each argument of an object."""
        name = self.resolved(node, TARGET, f"{key}.{TARGET}")
        if isinstance(name, Unresolved):
            return
        try:
            target = self.targets.locate(name) if isinstance(name, str) else None
        except ValueError as error:
            self.add(
                f"{key}.{TARGET}",
                f"{key}.{TARGET}: {error}. Give the full name of a class or function.",
            )
            return
        if target is None:
            self.add(
                f"{key}.{TARGET}",
                f"{key}.{TARGET} is {shown(name)}; give the full name of a class or function.",
            )
            return
        self.fits(node, key, kind)
        parameters = self.targets.get_parameters(target, given=node)
        self.arguments(node, key, parameters, of=_full_name(target))
        if not node.get("_partial_") and "_args_" not in node:
            for each in parameters.required:
                if each not in get_names(node):  # `in node` is false for a missing value
                    self.add(
                        f"{key}.{each}", f"{key}.{each} has no value. Give one: {key}.{each}=VALUE."
                    )

    def fits(self, value: Any, key: str, kind: Any) -> None:
        """Check that the object that `value` describes is of the expected kind."""
        if not isinstance(value, DictConfig) or not isinstance(value.get(TARGET), str):
            return
        try:
            target = self.targets.locate(value[TARGET])
        except ValueError:
            return  # reported where it is set
        if problem := self.kinds.misfit(target, kind, partial=value.get("_partial_") is True):
            self.add(key, f"{key}{problem.format(key=key)}")

    def arguments(self, node: DictConfig, key: str, parameters: Parameters, *, of: str) -> None:
        """Check each argument of an object against the parameters of its class `of`."""
        allowed = list(parameters.hints)
        for name in get_names(node):
            full = f"{key}.{name}"
            if name in SPECIAL:
                self.value(node, name, full, self.kinds.Kind(SPECIAL[name]))
            elif name in self.schema.GIVEN.get(key, ()):
                self.add(
                    full,
                    f"{full} is {shown(raw(node, name))}, but the stage sets it. Omit it.",
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
                    self.add(full, f"{full} is nan; give a value, or omit it.")
            else:
                why = f"is not a setting of {of.rpartition('.')[2]}"
                self.add(full, unread(full, allowed, why))

    def sampling(self, node: Any, key: str) -> None:
        """Check the options of the objective's ``sample``."""
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
        unknown = [name for name in get_names(node) if name not in allowed]
        if len(unknown) > 1:  # not misspelled: the options of another objective's sampler
            self.add(
                key,
                f"{key} has {', '.join(unknown)}, which are not sampling options of "
                f"{target.__name__}; its options: {', '.join(allowed)}. Select a sampler for this "
                f"objective: sampler@{key}=NAME.",
            )
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
                self.add(
                    key,
                    f"{key} refers to {written(node, name)}, which could not be resolved: "
                    f"{str(error).splitlines()[0]}.",
                )
            return Unresolved()


def _full_name(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
