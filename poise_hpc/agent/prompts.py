"""Prompts are Markdown files beside this module, reviewed like code. `$name` is a placeholder, `$$` a dollar.

What is the same in every request stands first, and what changes with each candidate last: providers charge less for a prompt whose
beginning they have just read.
"""
from __future__ import annotations

from functools import cache
from importlib.resources import files
from string import Template

READ_CODE = frozenset({"propose", "implement", "repair", "review"})  # operators that need the contract of a package


def render(name: str, **values: str) -> str:
    """prompts/<name>.md with every placeholder filled. KeyError if one has no value, ValueError if a value has no
    placeholder: evidence that is gathered and never shown is a mistake too. Values are not scanned for placeholders."""
    template = Template(files(__package__).joinpath("prompts", f"{name}.md").read_text(encoding="utf-8"))
    if unused := sorted(values.keys() - set(template.get_identifiers())):
        raise ValueError(f"prompts/{name}.md has no placeholder for {', '.join(unused)}")
    return template.substitute(values).strip() + "\n"


@cache
def system(operator: str) -> str:
    """The first message of every conversation of an operator."""
    return render("system") + ("\n" + render("contract", interface=interface()) if operator in READ_CODE else "")


def interface() -> str:
    """The contract and its helpers, as the installed source: a description of them would go stale."""
    folder = files("poise_hpc.algorithms")
    return "\n\n".join(f"```python poise_hpc/algorithms/{name}\n{folder.joinpath(name).read_text(encoding='utf-8').rstrip()}\n```"
                       for name in ("base.py", "ops.py", "grpo.py"))
