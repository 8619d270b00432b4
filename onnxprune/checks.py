"""Options that don't fit are refused by name, from whatever door they come."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from onnxprune.errors import UsageError

NUMBERS: dict[Any, Any] = {int: Integral, float: Real}
WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a word", NoneType: "nothing"}


def check_option(name: str, value: object, hint: Any, least: float | None = None) -> None:
    """Raises `UsageError` for a value that isn't what `hint` says, or is a number below `least`.

    A hint is a class, a Literal, `tuple[X, ...]` or `tuple[X, Y]`, which sequences but strings fit, or a union of them.
    """
    option = f"--{name.replace('_', '-')} {value}"
    if not _fits(value, hint):
        raise UsageError(f"{option}: give {' or '.join(_said(hint))}")
    if least is not None and isinstance(value, Real) and not float(value) >= least:
        raise UsageError(f"{option}: give {least:g} or more")


def _fits(value: object, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return isinstance(value, str) and value in parts
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        if parts[-1] is not Ellipsis:
            return len(value) == len(parts) and all(map(_fits, value, parts))
        return all(_fits(each, parts[0]) for each in value)
    return isinstance(value, NUMBERS.get(hint, hint)) and (hint is bool or not isinstance(value, bool))


def _said(hint: Any) -> list[str]:
    """What fits, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return [word for part in parts for word in _said(part)]
    if origin is Literal:
        return list(parts)
    if origin is tuple:
        if parts[-1] is not Ellipsis:
            return [f"({', '.join(' or '.join(_said(part)) for part in parts)})"]
        return [f"a list, each of it {' or '.join(_said(parts[0]))}"]
    return [WORDS.get(hint, f"a {hint.__name__}")]
