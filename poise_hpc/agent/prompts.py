"""Prompts are Markdown files beside this module, reviewed like code. `$name` is a placeholder, `$$` a dollar."""
from __future__ import annotations

from importlib.resources import files
from string import Template


def render(name: str, **values: str) -> str:
    """prompts/<name>.md with every placeholder filled. KeyError if one has no value, ValueError if a value has no
    placeholder: evidence that is gathered and never shown is a mistake too. Values are not scanned for placeholders."""
    template = Template(files(__package__).joinpath("prompts", f"{name}.md").read_text(encoding="utf-8"))
    if unused := sorted(values.keys() - set(template.get_identifiers())):
        raise ValueError(f"prompts/{name}.md has no placeholder for {', '.join(unused)}")
    return template.substitute(values).strip() + "\n"
