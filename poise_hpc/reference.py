"""Every setting with its value, type, limits and meaning, read from the classes that check it: config.py, agent_config.py.

What a key means is the comment beside it in the source: on its line, on lines of their own further in below it, or right above it.
Not here: what the task and its model take as `options` (the task checks them), and site files (site.py, class `Site`).
"""
from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, get_args

import yaml

from .config import Config
from .section import Section

LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
BEYOND = 10**9      # a limit from here on only keeps arithmetic sound
YAML_NAMES = {"None": "null", "True": "true", "False": "false"}
WORDS = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null", "object": "mapping"}


@dataclass(frozen=True)
class Key:
    key: str            # "train.steps"; "screen.rungs.*.at" of each element, "evaluate.benchmarks.*.split" of each value
    value: Any          # None for a key of elements
    default: Any
    type: str           # with limits: "integer >= 1"
    comment: str
    required: bool      # it has no default


def keys(config: Config) -> list[Key]:
    """In the order of the source."""
    return list(_keys(Config, config.dump(), Config().dump(), ""))


def _keys(section: type[Section], values: dict[str, Any] | None, defaults: dict[str, Any] | None, prefix: str) -> Iterator[Key]:
    schema, said = section.model_json_schema(), comments(section)
    for name, field in section.model_fields.items():
        value, inner = (values or {}).get(name), _section(field.annotation)
        default = None if field.is_required() else section.model_construct().model_dump(mode="json", include={name}, warnings=False)[name]
        if defaults is not None:
            default = defaults[name]
        if inner and field.annotation is inner:
            yield from _keys(inner, value, default, f"{prefix}{name}.")
            continue
        yield Key(prefix + name, value, default, _type(schema["properties"][name], schema.get("$defs", {})), said.get(name, ""), field.is_required())
        if inner:
            yield from _keys(inner, None, None, f"{prefix}{name}.*.")


def _section(annotation: Any) -> type[Section] | None:
    """The section that it is or holds: of `dict[str, Benchmark]` Benchmark."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


def _type(schema: dict[str, Any], known: dict[str, Any]) -> str:
    if "$ref" in schema:
        return "mapping of the keys below"
    if "anyOf" in schema:
        return " or ".join(_type(s, known) for s in schema["anyOf"])
    if options := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return "one of " + ", ".join(map(str, options))
    if schema.get("type") == "array":
        inner = schema.get("items") or schema["prefixItems"][0]
        count = f" of {schema['minItems']}" if schema.get("minItems") == schema.get("maxItems") is not None else ""
        return f"list{count}: {_type(inner, known)}"
    if isinstance(more := schema.get("additionalProperties"), dict):
        return f"name: {_type(more, known)}"
    limits = [f"{sign} {schema[name]:g}" for name, sign in LIMITS.items() if name in schema and schema[name] < BEYOND]
    return f"{WORDS.get(schema.get('type', ''), 'anything')} {', '.join(limits)}".strip()


def comments(section: type[Section]) -> dict[str, str]:
    """Field -> what its class says of it."""
    source = textwrap.dedent(inspect.getsource(section))
    found = {t.start[0]: (t.start[1], t.string.lstrip("# "), t.line[:t.start[1]].isspace())
             for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}
    out = {}
    for field in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            above, below = field.lineno - 1, (field.end_lineno or field.lineno) + 1
            lines = [text for n, (_, text, alone) in found.items() if field.lineno <= n < below and not alone]
            while above in found and found[above][2] and found[above][0] == field.col_offset:
                lines.insert(0, found[above][1])
                above -= 1
            while below in found and found[below][2] and found[below][0] > field.col_offset:
                lines.append(found[below][1])
                below += 1
            out[field.target.id] = re.sub(r"\b(None|True|False)\b", lambda m: YAML_NAMES[m[0]], " ".join(lines))
    return out


# --- what is printed

def data(config: Config) -> dict[str, Any]:
    """For `--json`."""
    return {"keys": [asdict(key) for key in keys(config)]}


def text(config: Config) -> str:
    """A config file that says the same, with what each key is, and the default where the value is another. Keys of elements are comments."""
    lines = ["# base: FILE  # or a list of files, read first; a path relative to this file. What a file leaves out has its default"]
    open_sections: tuple[str, ...] = ()
    for key in keys(config):
        *above, name = key.key.split(".")
        element = "*" in above
        if not element:
            shared = next((i for i, (a, b) in enumerate(zip(above, open_sections)) if a != b), min(len(above), len(open_sections)))
            lines += [f"{'  ' * depth}{section}:" for depth, section in list(enumerate(above))[shared:]]
            open_sections = tuple(above)
        known = "" if key.required or key.value == key.default else f" (default {_short(key.default)})"  # of elements no value is known
        what = f"{key.type}{known}; {key.comment}"
        indent = "  " * len(above[:above.index("*") if element else None])
        lines.append(f"{indent}# {name}: {what}" if element else f"{indent}{name}: {_yaml(key.value)}  # {what}")
    return "\n".join(lines)


def _short(default: Any) -> str:
    text = _yaml(default)
    return text if len(text) <= 60 else "another"


class _Dumper(yaml.SafeDumper):
    """Everything on one line: a text of several lines is written with escapes."""


_Dumper.add_representer(str, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", value, '"' if "\n" in value else None))


def _yaml(value: Any) -> str:
    return yaml.dump([value], Dumper=_Dumper, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False).strip()[1:-1]
