"""What a candidate's author makes of its check: let it train, correct it, or give it up. Runs in a thread: writes nothing."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .agent.base import Author, Draft, DraftRejected
from .lifecycle import Review
from .transcript import BudgetExceeded
from .types import Outcome


@dataclass(frozen=True)
class Ending:
    """A review's end. `draft`: another version of the package, if there is one; cause and message where it was rejected."""

    review: Review
    draft: Draft | None = None
    cause: str = ""
    message: str = ""


def review(author: Author, id: str, draft: Draft, check: dict[str, Any]) -> Ending:
    """`check`: the check attempt's result. Without budget nothing is asked: what passed may train, what failed is rejected."""
    passed = check["outcome"] == Outcome.SUCCEEDED
    problems = [] if passed else check["message"].splitlines() or [check["cause"]]
    try:
        if passed:
            problems = author.confirm(id, draft, check["payload"].get("response", {}))
            if not problems:
                return Ending("accepted")
        return Ending("revised", author.repair(id, draft, problems))
    except DraftRejected as error:
        # "check-failed" from `repair` means that no round is left: the cause is then what the rounds were for.
        cause = (check["cause"] or "inconsistent") if error.cause == "check-failed" else error.cause
        return Ending("rejected", None if error.draft == draft else error.draft, cause, error.message)
    except BudgetExceeded as error:
        if passed and not problems:
            return Ending("accepted")
        return Ending("rejected", None, check["cause"] or "inconsistent", "\n".join([*problems, f"not repaired: {error}"]))
