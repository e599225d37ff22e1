"""The door: every setting's type and bounds, before anything is built, written or trained.

Types are the hints of what a ``_target_`` names; those of the settings that make no object, and bounds, are in `schema`.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinyfusion_pl.cli.run_identity import items

MAX_TOLD = 8
REFERENCE = re.compile(r"\$\{[^{}]*\}")  # and nothing beside it
SPECIAL = {"_target_": str, "_partial_": bool, "_recursive_": bool, "_convert_": str, "_args_": list}


def check_added(cfg: DictConfig) -> None:
    """Refuse ``+experimnt=x``: Hydra adds it as a setting that nothing reads, and the default would run."""
    if not HydraConfig.initialized():
        return
    for override in HydraConfig.get().overrides.task:
        key = override.removeprefix("+").partition("=")[0]
        if override.startswith("+") and "." not in key and "@" not in key and key in cfg and not OmegaConf.is_config(cfg[key]):
            raise ValueError(f"There is no configuration group {key!r} to add ({override}). Groups to add are +experiment, +sweep and "
                             "+debug; --help lists the choices.")


def check_sweep(arguments: Sequence[str]) -> None:
    """Refuse ``-m`` where nothing has several values: it would be one run in a sweep's folder."""
    options = get_args_parser().parse_args(list(arguments))
    if not options.multirun or options.config_dir or options.config_name or not options.overrides:
        return
    parsed = OverridesParser.create().parse_overrides(options.overrides)
    names = ("sweep", "experiment")
    if not any(p.is_sweep_override() or p.key_or_group in names or "hydra." in p.key_or_group for p in parsed):
        raise ValueError(f"-m runs a sweep, but no setting has several values ({' '.join(options.overrides)}). Give values with commas, as "
                         "seed=0,1, or +sweep=NAME; or leave out -m.")


def check_single(sweeper: DictConfig) -> None:
    """Refuse a sweep's values without ``-m``: none of them would be used."""
    if params := sweeper.get("params"):
        raise ValueError(f"+sweep gives several values ({', '.join(f'{key}={value}' for key, value in params.items())}), but "
                         "without -m one run "
                         "is made, with none of them. Add -m.")


def check_complete(node: DictConfig | ListConfig) -> None:
    """Read every value, also behind references, so that a missing one is found (Hydra leaves it out of a partial)."""
    for key, _ in items(OmegaConf.to_container(node, resolve=False)):
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
        more = [f"({len(told) - MAX_TOLD} more settings are wrong.)"] if len(told) > MAX_TOLD else []
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
        self.is_main = set(cfg) >= schema.IS_MAIN

    def check(self) -> None:
        known = self.schema.MAIN.settings
        if self.is_main:
            self.plain(self.cfg, "", self.schema.MAIN)
            self.task()
            return
        for name in ("name", "seed", "run_dir"):
            if name in self.cfg:
                self.value(self.cfg, name, name, known[name])
        self.inside(self.cfg, "")
        self.names()

    # -- settings that make no object ---------------------------------------------------------------------------------------------------
    def plain(self, node: DictConfig, key: str, schema: Any) -> None:
        for name in node:
            full = f"{key}.{name}" if key else str(name)
            kind = schema.settings.get(name)
            if kind is None:
                if not (key == "" and (name == "hydra" or self.is_referred_to(name))):
                    self.unknown(full, schema.settings, "is no setting of this configuration")
            elif not isinstance(kind, self.schema.Plain):
                self.value(node, name, full, kind)
            elif isinstance(inner := _raw(node, name), DictConfig):
                self.plain(inner, full, kind)
            else:
                self.tell(full, f"{full} is {shown(inner)}; give a mapping ({', '.join(kind.settings)}).")
        if key == "":
            self.names()

    def names(self) -> None:
        for key, check in (("name", self.schema.check_name), ("run_dir", self.schema.check_run_dir)):
            if key in self.cfg and isinstance(value := _raw(self.cfg, key), str) and "${" not in value and value != "???":
                try:
                    check(key, value)
                except ValueError as error:
                    self.tell(key, str(error))

    def task(self) -> None:
        """What a task takes is what the rest of the configuration says: only that is in a run's identity."""
        task = _raw(self.cfg, "task")
        if not isinstance(task, DictConfig):
            return
        for name in task:
            if name not in ("stages", "overrides", "run_dir", *SPECIAL) and not OmegaConf.is_interpolation(task, name):
                self.tell(f"task.{name}", f"task.{name} is {shown(_raw(task, name))}; a task takes it from the rest of the "
                                          "configuration. Leave "
                                     f"it out and set {name} there.")

    def is_referred_to(self, name: str) -> bool:
        return name in self._references

    @property
    def _references(self) -> set[str]:
        if not hasattr(self, "_found"):
            texts = _texts(OmegaConf.to_container(self.cfg, resolve=False))
            self._found = {word for text in texts if "${" in text for word in _words(text)}
        return self._found

    # -- settings that make objects -----------------------------------------------------------------------------------------------------
    def value(self, node: DictConfig | ListConfig, name: Any, key: str, kind: Any) -> None:
        """Check one setting, and what is inside it."""
        if OmegaConf.is_missing(node, name):
            return
        refers = OmegaConf.is_interpolation(node, name)
        if refers and not REFERENCE.fullmatch(_written(node, name)) and kind.takes(lambda part: part is str):
            return  # a text with references in it is a text; to read it may take the hash of everything
        value = self.resolved(node, name, key)
        if isinstance(value, Unresolved):
            return
        plain = _container(value)
        try:
            found = kind.check(plain)
        except self.kinds.WrongKind as error:
            key = ".".join([key, *map(str, error.path)])
            where = home(self.cfg, key)
            taken = f" ({key} takes it)" if where != key else ""
            if where == key or where not in self.problems:  # what is wrong where it stands says more
                self.problems[where] = f"{where} is {shown(error.value)}{taken}; {error}.{_hint(error.value, error.kind)}"
            return
        if refers:
            return  # looked at where it stands
        if isinstance(value, (DictConfig, ListConfig)):
            if isinstance(value, DictConfig) and "_target_" in value:
                self.target(value, key, kind)
            else:
                self.inside(value, key, kind)
        if _is_sharper(plain, found):
            node[name] = found

    def inside(self, node: DictConfig | ListConfig, key: str, kind: Any = None) -> None:
        """Objects in lists and mappings that make none themselves."""
        inner = None if kind is None else kind.of_items()
        for name, _ in items(OmegaConf.to_container(node, resolve=False)):
            full = f"{key}.{name}" if key else str(name)
            if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
                continue
            child = _raw(node, name)
            if isinstance(child, DictConfig) and "_target_" in child:
                self.target(child, full, inner)
            elif isinstance(child, (DictConfig, ListConfig)):
                self.inside(child, full, inner)

    def target(self, node: DictConfig, key: str, kind: Any) -> None:
        """An object: its class, and each of its arguments."""
        name = self.resolved(node, "_target_", f"{key}._target_")
        try:
            target = self.targets.locate(name) if isinstance(name, str) else None
        except ValueError as error:
            self.tell(f"{key}._target_", f"{key}._target_: {error}. Give the full name of a class or function.")
            return
        if target is None:
            self.tell(f"{key}._target_", f"{key}._target_ is {shown(name)}; give the full name of a class or function.")
            return
        self.fits(target, node, key, kind)
        given = {each: _container(_raw(node, each)) for each in node}
        parameters = self.targets.parameters_of(target, given=given)
        self.arguments(node, key, parameters, of=_full_name(target))
        if not node.get("_partial_") and "_args_" not in node:
            for each in parameters.required:
                if each not in node.keys():  # a missing value is no member, but a key
                    self.tell(f"{key}.{each}", f"{key}.{each} has no value. Give one: {key}.{each}=VALUE.")

    def arguments(self, node: DictConfig, key: str, parameters: Any, *, of: str) -> None:
        allowed = list(parameters.hints)
        for name in node:
            full = f"{key}.{name}"
            if name in SPECIAL:
                self.value(node, name, full, self.kinds.Kind(SPECIAL[name]))
            elif name in self.schema.GIVEN.get(key, ()):
                self.tell(full, f"{full} is {shown(_container(_raw(node, name)))}, but it is set by what uses it. Leave it out.")
            elif name in allowed:
                kind = self.schema.kind_of(name, parameters.hints[name], target=of)
                if name == "sampling" and of.startswith("tinyfusion_pl."):
                    self.value(node, name, full, kind)
                    self.sampling(_raw(node, name), full)
                else:
                    self.value(node, name, full, kind)
            elif parameters.open:
                self.value(node, name, full, self.kinds.Kind(Any))
            else:
                self.unknown(full, allowed, f"is no setting of {of.rpartition('.')[2]}")

    def sampling(self, node: Any, key: str) -> None:
        """The options of the objective's ``sample``."""
        objective = OmegaConf.select(self.cfg, "objective")
        if not isinstance(node, DictConfig) or not isinstance(objective, DictConfig) or not isinstance(objective.get("_target_"), str):
            return
        try:
            target = self.targets.locate(objective._target_)
        except ValueError:
            return
        options = getattr(target, "sampling_options", None)
        if options is None:
            return
        parameters = self.targets.options_of(options)
        allowed = list(parameters.hints)
        unknown = [name for name in node if name not in allowed]
        if len(unknown) > 1 or (unknown and not difflib.get_close_matches(unknown[0], allowed, n=1)):
            self.tell(key, f"{key} has {', '.join(map(str, unknown))}, which sampling from {target.__name__} does not take; it takes "
                                 f"{', '.join(allowed)}. Choose a sampler that goes with the objective: sampler@{key}=NAME.")
            return
        self.arguments(node, key, parameters, of=_full_name(target))

    def fits(self, target: Any, node: DictConfig, key: str, kind: Any) -> None:
        """Whether what `target` makes is of the kind that is meant, as far as that shows beforehand."""
        if kind is None:
            return
        partial = node.get("_partial_") is True
        classes = [c for c in kind.takes(self.kinds.is_class) if not getattr(c, "_is_protocol", False) and c is not self.kinds.Built]
        functions, anything = kind.takes(self.kinds.is_callable), kind.takes(lambda part: part in (Any, self.kinds.Built))
        if anything or not (classes or functions):
            return
        if functions and not classes and isinstance(target, type) and not partial and "__call__" not in vars(target):
            self.tell(key, f"{key} makes a {target.__name__} at once, but is called later. Set {key}._partial_=true.")
        elif classes and not functions and partial:
            self.tell(key, f"{key}._partial_ is true, but a {classes[0].__name__} itself is needed. Leave _partial_ out.")
        elif classes and not functions and isinstance(target, type) and not issubclass(target, tuple(classes)):
            self.tell(key, f"{key} makes a {target.__name__}; give a _target_ that makes a {classes[0].__name__}.")

    def tell(self, key: str, problem: str) -> None:
        self.problems.setdefault(key, problem)

    # -- help ---------------------------------------------------------------------------------------------------------------------------
    def resolved(self, node: DictConfig | ListConfig, name: Any, key: str) -> Any:
        try:
            return node[name]
        except OmegaConfBaseException as error:
            if not OmegaConf.is_missing(node, name) and "hydra" not in str(_written(node, name)) and "Missing" not in str(error):
                self.tell(key, f"{key} refers to {_written(node, name)}, which cannot be read: {str(error).splitlines()[0]}.")
            return Unresolved()

    def unknown(self, key: str, known: Iterable[str], why: str) -> None:
        known = [str(name) for name in known]
        prefix, _, name = key.rpartition(".")
        near = difflib.get_close_matches(name, known, n=3)
        prefix = f"{prefix}." if prefix else ""
        does = f"Did you mean {' or '.join(prefix + each for each in near)}?" if near else f"It has {', '.join(known) or 'no settings'}."
        self.tell(key, f"{key} {why}, and nothing would read it. {does}")


class Unresolved:
    """Stands for a value behind a reference that leads nowhere."""


def home(cfg: DictConfig, key: str) -> str:
    """Where the value of `key` stands, behind references: ``data.seed`` -> ``seed``, ``task.evaluate.labels`` -> ``evaluate.labels``."""
    for _ in range(20):
        node, parts = cfg, key.split(".")
        for place, part in enumerate(parts):
            index = int(part) if isinstance(node, ListConfig) else part
            try:
                if OmegaConf.is_interpolation(node, index):
                    written = _written(node, index)
                    inner = written[2:-1]
                    if not (written.startswith("${") and written.endswith("}")) or not inner.replace(".", "").isidentifier():
                        return key
                    if inner.startswith("."):
                        return key
                    key = ".".join([inner, *parts[place + 1 :]])
                    break
                node = _raw(node, index)
            except (OmegaConfBaseException, TypeError, IndexError, ValueError):
                return key
        else:
            return key
    return key


def shown(value: Any) -> str:
    """A value as it is written on the command line, not too long."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(_container(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def _hint(value: Any, kind: Any) -> str:
    """What a person may have meant."""
    if isinstance(value, str) and value.lower() in ("none", "nil", "~") and kind.allows_null:
        return f" {value!r} is a text: write null, or leave it out."
    if isinstance(value, str) and kind.takes(lambda part: part in (int, float)) and _is_number(value):
        return " A number is written without quotes."
    if isinstance(value, (int, float)) and not isinstance(value, bool) and kind.takes(lambda part: part is str):
        return f""" If a text is meant, put it in quotes: '"{value}"'."""
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _raw(node: DictConfig | ListConfig, name: Any) -> Any:
    """The child of `node`; of a reference, how it is written."""
    if OmegaConf.is_missing(node, name):
        return "???"
    return _written(node, name) if OmegaConf.is_interpolation(node, name) else node[name]


def _written(node: DictConfig | ListConfig, name: Any) -> str:
    return str(OmegaConf.to_container(node, resolve=False)[name])


def _container(value: Any) -> Any:
    if not isinstance(value, (DictConfig, ListConfig)):
        return value
    try:
        return OmegaConf.to_container(value, resolve=True)
    except Exception:  # of a resolver too
        return OmegaConf.to_container(value, resolve=False)


def _is_sharper(value: Any, found: Any) -> bool:
    """Whether `found` has integers where `value` has whole floats."""
    if isinstance(value, float) and isinstance(found, int):
        return True
    if isinstance(value, list) and isinstance(found, list):
        return any(map(_is_sharper, value, found))
    if isinstance(value, Mapping) and isinstance(found, Mapping) and "_target_" not in value:
        return any(_is_sharper(value[key], found[key]) for key in value if key in found)
    return False


def _full_name(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"


def _texts(container: Any) -> Iterable[str]:
    if isinstance(container, str):
        yield container
    elif isinstance(container, (dict, list)):
        for _, value in items(container):
            yield from _texts(value)


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "_" else " " for c in text).split()
