"""What every part of a config or site file is made of: a typed section, the kinds of numbers in it, and errors that name the key.

An unknown key, a wrong type or an impossible value is a `UsageError`; for a misspelling it says which key was probably meant.
"""
from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .types import UsageError

LARGEST = 1e15                      # of any number: what is computed from it, e.g. seconds from minutes, stays one
Positive = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)  # YAML knows lists only


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


M = TypeVar("M", bound=Section)


def validate(model: type[M], data: Any, where: str) -> M:
    """`model` from plain data; UsageError naming the key otherwise."""
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UsageError(f"{where}: a mapping of sections was wanted, got {type(data).__name__}")
    if odd := next(_odd_numbers(data), None):
        raise UsageError(f"{where}: '{odd[0]}': a finite number below {LARGEST:g} was wanted, got {str(odd[1])[:24]}")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise UsageError("\n".join(f"{where}: {_explain(model, e)}" for e in error.errors())) from None


def _odd_numbers(data: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """(key, value) of every number that is infinite, NaN or absurd, also among what a section passes on unread."""
    if isinstance(data, dict | list | tuple):
        for name, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _odd_numbers(value, f"{key}.{name}" if key else str(name))
    elif isinstance(data, float) and not abs(data) < LARGEST or isinstance(data, int) and abs(data) >= LARGEST:
        yield key, data


def _explain(model: type[Section], error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            close = difflib.get_close_matches(str(error["loc"][-1]), _fields(model, error["loc"][:-1]), n=1)
            parent = "".join(f"{part}." for part in error["loc"][:-1])
            return f"unknown key '{key}'" + (f"; did you mean '{parent}{close[0]}'?" if close else
                                             f"; known here: {', '.join(_fields(model, error['loc'][:-1]))}")
        case "missing":
            return f"'{key}' is missing"
        case "value_error":
            return (f"'{key}': " if key else "") + str(error["ctx"]["error"])
        case "model_type":
            return f"'{key}': a mapping of settings was wanted, got {error['input']!r}"
    return f"'{key}': {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}{_as_yaml_has_it(error)}"


def _as_yaml_has_it(error: Any) -> str:
    """YAML 1.1 takes 3e-4 for a text."""
    try:
        number = float(error["input"]) if error["type"] == "float_type" and isinstance(error["input"], str) else math.nan
    except ValueError:
        return ""
    return f": in YAML that is a text, write {str(number) if '.' in str(number) else str(number).replace('e', '.0e')}" if math.isfinite(number) else ""


def _fields(model: Any, loc: tuple[Any, ...]) -> list[str]:
    for part in loc:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field else next((a for a in get_args(model) if hasattr(a, "model_fields")), model)
    return list(getattr(model, "model_fields", {}))
