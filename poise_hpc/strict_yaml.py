"""YAML that says each thing once. PyYAML lets a key's last value win without a word: a setting that somebody reads is not the one that holds."""
from __future__ import annotations

from contextlib import suppress
from typing import Any

import yaml


class _Once:
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if before := first.get(key.value):
                raise yaml.YAMLError(f"the key '{key.value}' stands there twice, in lines {before.start_mark.line + 1} and "
                                     f"{key.start_mark.line + 1}. Keep one")
            first[key.value] = key
        return super().construct_mapping(node, deep)  # type: ignore[misc]


class _Exact(_Once, yaml.SafeLoader):
    """Its errors show the place."""


class _Fast(_Once, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """libyaml's, where PyYAML was built with it: a config in an eighth of the time."""


def load(text: str) -> Any:
    """Plain data; yaml.YAMLError for what is no YAML or gives a key twice."""
    with suppress(yaml.YAMLError, ValueError):  # then the other one says it
        return yaml.load(text, _Fast)  # both are SafeLoaders
    try:
        return yaml.load(text, _Exact)
    except ValueError as error:  # a date or a number that is none
        raise yaml.YAMLError(str(error)) from None
    except RecursionError:
        raise yaml.YAMLError("nested too deeply to be read") from None
