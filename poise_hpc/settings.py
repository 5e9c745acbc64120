"""Settings as plain data: a YAML file, over the files that its key `base` names."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from . import strict_yaml
from .types import UsageError


def read(path: Path) -> dict[str, Any]:
    """Plain data of a YAML file over its `base`, if it names one."""
    return _read(path, ())


def overlay(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`change` over `base`, section by section; lists and benchmark tables are replaced whole."""
    out = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict) and key != "benchmarks"
        out[key] = overlay(out[key], value) if both else value
    return out


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = Path(os.path.abspath(path))
    if path in seen:
        raise UsageError(f"{path}: 'base' leads back to itself")
    try:
        data = strict_yaml.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file" + (f"; {seen[-1]} names it as its 'base'" if seen else "")) from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; a YAML file was wanted") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: cannot be read as UTF-8: {error}. Save it in that encoding") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not valid YAML: {error}") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a mapping of sections was wanted, got {type(data).__name__}")
    bases, under = data.pop("base", None) or [], {}
    for base in [bases] if isinstance(bases, str) else bases:
        under = overlay(under, _read(path.parent / base, (*seen, path)))
    return overlay(under, data)
