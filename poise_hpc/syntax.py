"""Candidate code as syntax trees: it is read, never executed. Standard library only."""
from __future__ import annotations

import ast
import threading

_LOCK = threading.Lock()


def parse(text: str) -> ast.Module:
    """`ast.parse`, one thread at a time: before 3.11.8 and 3.12.1 CPython counts the parser's depth for all threads together, and two
    at once may end in "SystemError: AST constructor recursion depth mismatch" (gh-106905). SyntaxError, ValueError as there."""
    with _LOCK:
        return ast.parse(text)
