"""Packages in replies: whole files as fenced blocks, changes as search-and-replace blocks.

Code travels outside JSON: models write worse code when they must escape it. Text only, nothing is executed.

    ```python algorithm.py          <<<<<<< SEARCH algorithm.py
    ...                             the exact old lines
    ```                             =======
                                    the new lines
                                    >>>>>>> REPLACE
"""
from __future__ import annotations

import re
from collections.abc import Mapping

from .conversation import BadReply

MAX_FILES, MAX_CHARS = 8, 60_000
NAME = r"[A-Za-z_][A-Za-z0-9_]*\.py"
BLOCK = re.compile(rf"^(?P<fence>```+)[ \t]*python[ \t]+(?P<name>{NAME})[ \t]*\r?\n(?P<text>.*?)^(?P=fence)[ \t]*$", re.S | re.M)
EDIT = re.compile(rf"^<<<<<<< SEARCH (?P<name>{NAME})[ \t]*\r?\n(?P<old>.*?)^=======[ \t]*\r?\n(?P<new>.*?)^>>>>>>> REPLACE[ \t]*$",
                  re.S | re.M)
ANY_BLOCK = re.compile(r"^```+[ \t]*(?:python|py)?[ \t]*\r?\n(?P<text>.*?)^```+[ \t]*$", re.S | re.M)


def read_package(text: str) -> dict[str, str]:
    """A whole package: file name -> text. A single block without a name is algorithm.py."""
    _closed(text)
    files = {m["name"]: m["text"] for m in BLOCK.finditer(text)}
    unnamed = ANY_BLOCK.findall(text)
    if not files and len(unnamed) == 1:
        files = {"algorithm.py": unnamed[0]}
    return _whole(files)


def read_change(text: str, package: Mapping[str, str], may_stay: bool = False) -> dict[str, str]:
    """`package` after a reply's whole files and edits; at least one unless it `may_stay` as it is."""
    _closed(text)
    files = dict(package) | {m["name"]: m["text"] for m in BLOCK.finditer(text)}
    edits = list(EDIT.finditer(text))
    if not edits and files == package and not may_stay:
        raise BadReply("the reply changes nothing; send whole files as ```python NAME.py blocks, or SEARCH/REPLACE edits")
    for number, edit in enumerate(edits, 1):
        name, old, new = edit["name"], edit["old"], edit["new"]
        found = files.get(name, "").count(old) if old.strip() else 0
        if found != 1:
            raise BadReply(f"edit {number}: its SEARCH text stands {found} times in {name}; it must stand there exactly "
                           "once, copied to the letter. Or send the whole file")
        files[name] = files[name].replace(old, new)
    return _whole(files)


def show_package(package: Mapping[str, str]) -> str:
    """As prompts show it, and as replies should look."""
    return "\n\n".join(f"```python {name}\n{text.rstrip()}\n```" for name, text in sorted(package.items()))


def without_code(text: str) -> str:
    """What a reply says beside its files and edits."""
    return EDIT.sub("", BLOCK.sub("", text))


def _closed(text: str) -> None:
    if len(re.findall(r"^```", text, re.M)) % 2:
        raise BadReply("a ``` block is not closed; send the whole reply again")


def _whole(files: dict[str, str]) -> dict[str, str]:
    if "algorithm.py" not in files:
        raise BadReply("no whole file algorithm.py; start its block with the line ```python algorithm.py and close it with ```")
    if len(files) > MAX_FILES or sum(map(len, files.values())) > MAX_CHARS:
        raise BadReply(f"a package has at most {MAX_FILES} files and {MAX_CHARS} characters")
    return {name: text.replace("\r\n", "\n") for name, text in files.items()}
