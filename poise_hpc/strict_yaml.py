"""YAML that says each thing once. PyYAML lets a key's last value win without a word: a setting that somebody reads is not the one that holds."""
from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if before := first.get(key.value):
                raise yaml.YAMLError(f"the key '{key.value}' stands there twice, in lines {before.start_mark.line + 1} and "
                                     f"{key.start_mark.line + 1}. Keep one")
            first[key.value] = key
        return super().construct_mapping(node, deep)


def load(text: str) -> Any:
    """Plain data; yaml.YAMLError for what is no YAML or gives a key twice."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except ValueError as error:  # a date or a number that is none
        raise yaml.YAMLError(str(error)) from None
    except RecursionError:
        raise yaml.YAMLError("nested too deeply to be read") from None
