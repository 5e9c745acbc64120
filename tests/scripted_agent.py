"""A language model that plays a part: an endpoint's script that answers each operator from what the prompt says.

The stories are told by candidate id, which the history in the prompt gives away; later operators know them by the proposal's
name. Nothing is remembered between requests but which troubles have struck, so a killed controller hears the same again.
"""
from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from helpers_agent import CONSISTENT, idea, inconsistent, package
from llm_server import Answer, Behaviour, Disconnect, Hang, Status
from poise_hpc.agent.review import static_evidence
from poise_hpc.algorithms import seeds

OPERATORS = {"Propose ": "propose", "Write the package": "implement", "Correct this package": "repair",
             "You review another": "review", "A candidate is finished": "reflect", "Revise the living": "synthesize"}
USAGE = {"propose": (4000, 700), "implement": (6000, 1500), "repair": (7000, 400), "review": (5000, 300), "reflect": (3000, 200),
         "synthesize": (2000, 100)}  # prompt and completion tokens that the endpoint charges


def seed(name: str, *changes: tuple[str, str]) -> str:
    """A seed algorithm's module with replacements, each of which must fit exactly once."""
    text = seeds.source(name)
    for old, new in changes:
        assert text.count(old) == 1, (name, old)
        text = text.replace(old, new)
    return text


@dataclass(frozen=True)
class Story:
    """What becomes of one candidate. `code`: the first package; `repairs`: whole packages, one a round."""

    name: str
    code: str = ""
    repairs: tuple[str, ...] = ()
    finds: tuple[str, ...] = ()                # the reviewer's complaint about package 0, 1, ...; "" is none
    measured: str = ""                         # its complaint when the measured response is put to it
    propose: tuple[Behaviour | None, ...] = ()  # instead of the ideas, turn by turn
    trouble: dict[str, tuple[Behaviour, ...]] | None = None  # operator -> what strikes first
    sibling: str | None = None                 # id of a story whose idea travels along
    promises: str = ""                         # code that the proposal describes, if it is not what is written
    responds_to: tuple[str, ...] = ("reward", "group", "logp_old")

    def idea(self) -> dict[str, Any]:
        seen = static_evidence({"algorithm.py": self.promises or self.code})
        numbers = [(name, value) for name, _, value in (h.partition(" = ") for h in seen["hyperparameters"]) if re.fullmatch(r"[\d.e-]+", value)]
        return idea(self.name, tuple(seen["mechanisms"]), responds_to=list(self.responds_to),
                    hyperparameters=[{"name": n, "value": float(v), "meaning": n} for n, v in numbers])


class Agent:
    """The endpoint's script. `asked`: (operator, story) of each request, in order."""

    def __init__(self, stories: dict[str, Story], struck: Callable[[int], None] = lambda number: None):
        self.stories, self.struck = stories, struck
        self.by_name = {s.name: s for s in stories.values()}
        self.asked: list[tuple[str, str]] = []
        self._troubles: dict[tuple[str, str], int] = {}
        self._lock = threading.Lock()

    def __call__(self, request: dict[str, Any]) -> Behaviour:
        messages = request["messages"]
        text, turn = messages[1]["content"], sum(m["role"] == "assistant" for m in messages)
        task = text.split("# Task\n\n", 1)[1]
        operator = next(name for start, name in OPERATORS.items() if task.startswith(start))
        story = self.story(operator, text)
        with self._lock:
            self.asked.append((operator, story.name if story else "-"))
            number = len(self.asked)
            strikes = (story.trouble or {}).get(operator, ()) if story else ()
            n = self._troubles.get(self.asked[-1], 0)
            self._troubles[self.asked[-1]] = n + 1
        self.struck(number)
        said = strikes[n] if n < len(strikes) else getattr(self, operator)(story, text, turn)
        return Answer(said, usage=USAGE[operator]) if isinstance(said, str) else said

    def story(self, operator: str, text: str) -> Story | None:
        if operator == "synthesize":
            return None
        if operator == "propose":
            history = text.split("# All that was tried", 1)[1].split("\n# ", 1)[0]
            newest = max(int(n) for n in re.findall(r"^- c(\d{4}) ", history, re.M))
            return self.stories[f"c{newest + 1:04d}"]
        return self.by_name.get(re.search(r"^- name: (\S+)", text, re.M)[1])

    def propose(self, story: Story, text: str, turn: int) -> str | Behaviour:
        if turn < len(story.propose) and story.propose[turn] is not None:
            return story.propose[turn]
        several = [story, *([self.stories[story.sibling]] if story.sibling else [])]
        return f"Here they are.\n\n```json\n{json.dumps({'proposals': [s.idea() for s in several]})}\n```\nGood luck!"

    def implement(self, story: Story, text: str, turn: int) -> str:
        return "The package:\n\n" + package(story.code)

    def repair(self, story: Story, text: str, turn: int) -> str:
        """The next package; where there is none left, the same one with a comment."""
        packages, number = [story.code, *story.repairs], self.round(story, text)
        return package(packages[number + 1] if number + 1 < len(packages) else packages[number] + "# once more\n")

    def review(self, story: Story, text: str, turn: int) -> str:
        measured = "- against the proposal: " in text
        if measured and story.measured and self.round(story, text) == 0:
            return inconsistent(story.measured)
        found = story.finds[min(self.round(story, text), len(story.finds) - 1)] if story.finds and not measured else ""
        return inconsistent(found) if found else CONSISTENT

    def reflect(self, story: Story | None, text: str, turn: int) -> str:
        overall = re.search(r"^- this candidate: Overall (\S+?)(?:;| \[)", text, re.M)
        cited = [{"of": "candidate", "quantity": "overall", "step": None, "value": float(overall[1])}] if overall else []
        return json.dumps({"verdict": "undecided", "diagnosis": f"{story.name if story else 'GRPO'} learns as fast as its parent.",
                           "citations": cited, "symptoms": ["slow-start"], "next_step": "Widen the change."})

    def synthesize(self, story: None, text: str, turn: int) -> str:
        return json.dumps({"principles": [{"principle": "Keep clips.", "why": "stable", "supports": ["c0001"], "contradicts": []}],
                           "open_questions": []})

    def round(self, story: Story, text: str) -> int:
        """Which of the story's packages the prompt shows."""
        shown = [i for i, code in enumerate((story.code, *story.repairs)) if code.strip() in text]
        return max(shown, default=0)


SWITCH = ("    validity_masking: bool = True   # False: GRPO\n", "")
VALID = seed("validity_masking", SWITCH, (', off={"validity_masking": False}', ""), (" if self.validity_masking else torch.ones_like(rollouts.valid)", ""))
SIGN = ("return -A * 4 / tau", "return A * 4 / tau")

STORIES = {
    "c0000": Story("GRPO"),
    "c0001": Story("MAXRL-GRPO", seed("maxrl"), sibling="c0002"),
    "c0002": Story("SEQ-GRPO", seed("gspo"), trouble={"implement": (Status(429, headers={"Retry-After": "0.01"}),)}),
    # wrong, unseen by the reviewer; the checks find it, and it is corrected
    "c0003": Story("SOFT-GRPO", seed("sapo", SIGN), repairs=(seed("sapo"),)),
    # does not do what it says: the reviewer finds that, twice
    "c0004": Story("CI-GRPO", seed("cispo"), finds=("line 40 clips the loss, not the weight",)),
    "c0005": Story("MAXRL2-GRPO", seed("maxrl")),  # a duplicate of c0001, however often it is told
    "c0006": Story("LOO-GRPO", seed("rloo"), propose=(Answer("{'proposals': [oops", usage=USAGE["propose"]),)),
    "c0007": Story("NEVER", propose=(Answer("I think that", usage=USAGE["propose"]),) * 2),
    "c0008": Story("TAPER-GRPO", seed("topr"), propose=(Answer('{"proposals": [{"name": "TA', finish="length", usage=USAGE["propose"]),)),
    "c0009": Story("NEVER2", propose=(Answer(None, refusal="I cannot help with that.", usage=(4000, 5)),)),
    "c0010": Story("NEVER3", propose=(Answer("", usage=(4000, 0)),)),
    "c0011": Story("FILES-GRPO", seed("aspo", ("import torch\n", "import os\n\nimport torch\n"))),
    # wrong, and its repair is too
    "c0012": Story("GEO-GRPO", seed("gmpo", ("return -A * masked_mean", "return A * masked_mean"))),
    # reads `valid` without effect: the measured response shows it
    "c0013": Story("VALID-GRPO", VALID.replace("live = rollouts.valid\n", "live = rollouts.valid | True\n"), repairs=(VALID,),
                   measured="`live` is always true", responds_to=("reward", "group", "valid")),
    "c0014": Story("BATCH-GRPO", seed("reinforce_pp"), trouble={"implement": (Status(500), Disconnect()), "review": (Hang(),)}),
}
