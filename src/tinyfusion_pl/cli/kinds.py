"""Checks of a setting's value against a type hint, by pydantic.

Strings are not numbers, whole floats are integers, and NaN is never valid.
"""

from __future__ import annotations

import collections.abc
import math
import os
import types
import typing
from collections.abc import Callable
from functools import cache
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticCustomError

TARGET = "_target_"
LISTS = (
    list,
    tuple,
    set,
    frozenset,
    collections.abc.Sequence,
    collections.abc.Iterable,
    collections.abc.Collection,
)
MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
NOTHING = type(None)


def _no_bool_or_text(value: Any) -> Any:
    """Restrict pydantic's lax mode, which accepts 2.0 for 2, but also True and "2"."""
    if isinstance(value, (bool, str)):
        raise PydanticCustomError("whole", "a bool or a string is not a number")
    return value


def _is_built(value: Any) -> Any:
    if not (isinstance(value, collections.abc.Mapping) and TARGET in value):
        raise PydanticCustomError("built", "a mapping with _target_ is expected")
    return value


class Built:
    """The hint of a setting that is a mapping with any ``_target_``."""


WHOLE = Annotated[int, BeforeValidator(_no_bool_or_text)]
NUMBER = Annotated[float, Strict()]  # takes integers too
BUILT = Annotated[Any, AfterValidator(_is_built)]
PLAIN = {int: WHOLE, float: NUMBER, bool: Annotated[bool, Strict()], str: Annotated[str, Strict()]}
FILLED = Annotated[str, Strict(), StringConstraints(pattern=r"\S")]
CONFIG = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)


class KindError(ValueError):
    """The message states what is allowed.

    Attributes:
        path: Keys and indices that lead to the invalid item of the value.
        kind: Kind of that item.
        value: That item.
    """

    def __init__(self, kind: Kind, value: Any, error: ValidationError) -> None:
        self.path: list[Any] = []
        place: Any  # the location also contains the names of union members
        for place in error.errors()[0]["loc"]:
            inner = kind.of_items()
            if inner is None or not isinstance(value, (list, dict)):
                break
            if place in (range(len(value)) if isinstance(value, list) else value):
                self.path.append(place)
                kind, value = inner, value[place]
        self.kind, self.value = kind, value
        described = kind.describe()
        if isinstance(value, str) and not value.strip():
            described = described.replace("a string", "a non-empty string")
        if isinstance(value, float) and not math.isfinite(value):
            described = described.replace("a number", "a finite number")
        super().__init__(f"give {described}")


class Kind:
    """The values that one setting accepts.

    Args:
        hint: Type hint of the parameter. A class stands for a mapping with ``_target_``.
        least: Lower bound of a number, and of each number in a list.
        most: Upper bound of the same.
        blank: Whether a string may be empty.
    """

    def __init__(
        self,
        hint: Any,
        *,
        least: float | None = None,
        most: float | None = None,
        blank: bool = True,
    ) -> None:
        self.hint, self.least, self.most, self.blank = hint, least, most, blank

    def __repr__(self) -> str:
        return f"Kind({self.hint!r})"

    def check(self, value: Any) -> Any:
        """`value` as the hint's type: whole floats as integers.

        Raises:
            KindError: for any other value; states what is allowed.
        """
        try:
            return _adapter(self.hint, self.least, self.most, self.blank).validate_python(value)
        except ValidationError as error:
            raise KindError(self, value, error) from None

    def describe(self) -> str:
        """What follows "give": ``an integer from 0 to 8 or null``."""
        kinds = [
            words
            for part in _members(self.hint)
            if part is not NOTHING
            for words in _words(part, self.least, self.most)
        ]
        kinds = list(dict.fromkeys(kinds))
        if _allows_null(self.hint):
            kinds.append("null")
        return f"{', '.join(kinds[:-1])} or {kinds[-1]}" if len(kinds) > 1 else kinds[0]

    @property
    def allows_null(self) -> bool:
        """Whether null is valid."""
        return _allows_null(self.hint)

    def of_items(self) -> Kind | None:
        """The kind of the items of a list or mapping; None: any kind."""
        found = [
            get_args(part)[-1]
            for part in _members(self.hint)
            if (get_origin(part) in LISTS + MAPPINGS)
            and get_args(part)
            and get_args(part)[-1] is not Ellipsis
        ]
        if not found:
            return None
        hint = typing.Union[tuple(found)]  # noqa: UP007  (`|` takes no tuple)
        return Kind(hint, least=self.least, most=self.most, blank=self.blank)

    def takes(self, what: Callable[[Any], bool]) -> list[Any]:
        """The members of the hint for which `what` is true."""
        return [part for part in _members(self.hint) if what(part)]


@cache
def _adapter(hint: Any, least: float | None, most: float | None, blank: bool) -> TypeAdapter:
    return TypeAdapter(_translated(hint, least, most, blank), config=CONFIG)


def is_callable(hint: Any) -> bool:
    """Whether a hint is a `Callable`."""
    return hint is collections.abc.Callable or get_origin(hint) is collections.abc.Callable


def is_class(hint: Any) -> bool:
    """Whether a hint is a class whose instances a configuration describes by a ``_target_``."""
    plain = (*PLAIN, *LISTS, *MAPPINGS, object, NOTHING)
    return (
        isinstance(hint, type)
        and get_origin(hint) is None
        and hint not in plain
        and not issubclass(hint, (os.PathLike, PurePath))
    )


def _members(hint: Any) -> list[Any]:
    if get_origin(hint) in (typing.Union, types.UnionType):
        return [part for each in get_args(hint) for part in _members(each)]
    if get_origin(hint) is Annotated:
        return _members(get_args(hint)[0])
    return [NOTHING if hint is None else hint]


def _allows_null(hint: Any) -> bool:
    return any(part is NOTHING or _is_any(part) for part in _members(hint))


def _is_any(hint: Any) -> bool:
    return hint in (Any, object) or isinstance(hint, (str, typing.TypeVar, typing.ForwardRef))


def _translated(hint: Any, least: float | None, most: float | None, blank: bool) -> Any:
    """`hint` in the terms of pydantic."""
    parts = _members(hint)
    if len(parts) > 1:
        translated = [_translated(part, least, most, blank) for part in parts]
        return typing.Union[tuple(translated)]  # noqa: UP007  (`|` takes no tuple)
    (part,) = parts
    if part in (int, float):
        return Annotated[PLAIN[part], Field(ge=least, le=most)]
    if part in PLAIN:
        return FILLED if part is str and not blank else PLAIN[part]
    if part is NOTHING:
        return None
    if _is_any(part):
        return Any
    origin, arguments = get_origin(part) or part, get_args(part)
    if origin is Literal:
        return part
    if origin in LISTS:
        items = [each for each in arguments if each is not Ellipsis] or [Any]
        union = typing.Union[tuple(items)]  # noqa: UP007  (`|` takes no tuple)
        listed: Any = list.__class_getitem__(_translated(union, least, most, blank))
        if origin is tuple and len(items) > 1 and Ellipsis not in arguments:
            return Annotated[listed, Field(min_length=len(items), max_length=len(items))]
        return listed
    if origin in MAPPINGS:
        value = _translated(arguments[1], least, most, blank) if len(arguments) == 2 else Any
        return dict.__class_getitem__((Any, value))
    if isinstance(part, type) and issubclass(part, (os.PathLike, PurePath)):
        return PLAIN[str] if blank else FILLED
    return BUILT


def _words(part: Any, least: float | None, most: float | None) -> list[str]:
    """A member of a hint in words: several if it lists values."""
    origin, arguments = get_origin(part) or part, get_args(part)
    if part in (int, float):
        number = "an integer" if part is int else "a number"
        if least is not None and most is not None:
            return [f"{number} from {least:.15g} to {most:.15g}"]
        if least is not None:
            return [f"{number} >= {least:.15g}"]
        return [number if most is None else f"{number} <= {most:.15g}"]
    if origin is Literal:
        return list(map(repr, arguments))
    if _is_any(part):
        return ["anything"]
    if part is bool:
        return ["true", "false"]
    if part is str:
        return ["a string"]
    if origin in LISTS:
        return ["a list"]
    if origin in MAPPINGS:
        return ["a mapping"]
    return [
        "a path"
        if isinstance(part, type) and issubclass(part, (os.PathLike, PurePath))
        else "a mapping with _target_"
    ]


def misfit(target: Any, kind: Kind | None, *, partial: bool) -> str | None:
    """Why `target` does not make what `kind` expects, as text to put after the key; None if it may.

    Only what shows without calling `target`.
    """
    if kind is None or kind.takes(lambda part: part in (Any, Built)):
        return None
    classes = [each for each in kind.takes(is_class) if not getattr(each, "_is_protocol", False)]
    functions = kind.takes(is_callable)
    if (
        functions
        and not classes
        and isinstance(target, type)
        and not partial
        and "__call__" not in vars(target)
    ):
        return (
            f" instantiates a {target.__name__}, but a factory is expected. Set "
            "{key}._partial_=true."
        )
    if classes and not functions and partial:
        return (
            f"._partial_ is true, but a {classes[0].__name__} is expected, not a factory. Omit "
            "_partial_."
        )
    if (
        classes
        and not functions
        and isinstance(target, type)
        and not issubclass(target, tuple(classes))
    ):
        return (
            f" instantiates a {target.__name__}; give a _target_ that instantiates a "
            f"{classes[0].__name__}."
        )
    return None
