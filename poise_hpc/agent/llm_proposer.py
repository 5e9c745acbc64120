"""The LLM agent behind the `Proposer` seam: propose, implement, review, repair, reflect, synthesize.

    notes revised? -> ideas -> novel? -> package -> gate, declarations, reviewer -> Draft
                        ^________|          ^______________________|   bounded rounds
    check job fails, or its response report speaks against the proposal (`confirm`) -> repair -> Draft

While a package is written and reviewed, those of its siblings are written beside it; they find theirs in the transcript.

Stateless: everything is a function of the context and of recorded replies, so a killed controller that proposes again
gets the same draft without paying again. What ends for good is a `DraftRejected`: evidence, archived with its cause.
What a later try may cure (`replay.Unavailable`) or a person (`replay.Rejected`, `transcript.BudgetExceeded`) passes through.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from ..algorithms import gate
from ..config import Config
from ..replay import EmptyReply, LLM, LLMError, Refused, TooLong
from ..transcript import BudgetExceeded
from ..types import Outcome, Proposal, Reflection
from . import llm_reflect, propose, reflect as rules, review
from .base import Context, Draft, DraftRejected, Facts
from .conversation import Malformed
from .implement import implement, repair
from .priors import CARDS, keep, load_cards
from .synthesize import notes_for

FINAL: dict[type[LLMError], str] = {  # recorded, the same for ever: asking again would not help
    Malformed: "malformed-reply", Refused: "refused", EmptyReply: "empty-reply", TooLong: "prompt-too-long"}
NEVER_RUN = frozenset({"duplicate", "gate", "inconsistent", *FINAL.values()})


class LLMProposer:
    def __init__(self, llm: LLM, config: Config, campaign: Path):
        self.llm, self.config, self.notes = llm, config, campaign / "notes"
        self.cards = load_cards(*keep([Path(folder).expanduser() for folder in config.agent.cards], campaign / CARDS))

    def propose(self, context: Context) -> Draft:
        try:
            notes = notes_for(self.llm, context, self.config.agent.synthesize_every, self.notes)
            ideas = propose.propose(self.llm, context, self.config, notes, self.cards)
        except tuple(FINAL) as error:
            raise DraftRejected(FINAL[type(error)], str(error), Draft(propose.unproposed(context, self.config), {})) from None
        proposal = propose.choose(ideas)
        if reason := proposal.details.get("duplicate"):
            raise DraftRejected("duplicate", reason, Draft(proposal, {}))

        def work() -> Draft:
            return self._work(context.id, Draft(proposal, {}), lambda: self._implement(context.id, proposal, context),
                              lambda draft: propose.novelty(draft, context))

        if not (siblings := propose.ahead(context, proposal, self.config)):
            return work()
        with ThreadPoolExecutor(len(siblings)) as pool:
            for id, sibling in siblings:
                pool.submit(self._implement, id, sibling, context)  # nobody reads its end: what fails here fails in the sibling's own turn
            try:
                return work()
            except BudgetExceeded:
                pass
        return work()  # what the siblings' calls had reserved may have come back

    def _implement(self, id: str, proposal: Proposal, context: Context) -> Draft:
        second = context.code(proposal.parents[1]) if len(proposal.parents) > 1 else {}
        return Draft(proposal, implement(self.llm, id, proposal, context.parent_code, second))

    def repair(self, id: str, draft: Draft, messages: Sequence[str]) -> Draft:
        """The draft after its check job found `messages`; DraftRejected once `agent.repair_rounds` are used up."""
        done = draft.proposal.details.get("repairs", 0)
        if done >= self.config.agent.repair_rounds:
            raise DraftRejected("check-failed", "; ".join(messages), draft)
        proposal = propose.with_details(draft.proposal, repairs=done + 1)
        return self._work(id, Draft(proposal, draft.files), lambda: repair(self.llm, id, proposal, draft.files, messages))

    def confirm(self, id: str, draft: Draft, response: Mapping[str, float]) -> list[str]:
        """After its checks passed: what the measured response (payload["response"] of the check job) speaks against, if
        the reviewer agrees. [] lets it train; else `repair` with this."""
        if not review.contradictions(draft.proposal, response):
            return []
        try:
            return review.review(self.llm, id, draft.proposal, draft.files, response)
        except tuple(FINAL) as error:
            raise DraftRejected(FINAL[type(error)], str(error), draft) from None

    def reflect(self, facts: Facts) -> Reflection:
        if facts.outcome is Outcome.CANDIDATE_ERROR and facts.cause in NEVER_RUN:
            return rules.reflect(facts)  # the cause says it all; there is nothing to diagnose, and nothing to pay for
        return llm_reflect.reflect(self.llm, facts, rules.reflect(facts), self.config)

    def _work(self, id: str, draft: Draft, first: Callable[[], Draft], novelty: Callable[[Draft], str | None] = lambda draft: None) -> Draft:
        """A package that gate, declarations, novelty and reviewer accept, in a bounded number of rounds."""
        try:
            draft = first()
            for done in count():
                cause, problems = self._problems(id, draft, novelty)
                if not problems:
                    return draft
                if done == self.config.agent.repair_rounds:
                    raise DraftRejected(cause, "; ".join(problems), draft)
                draft = repair(self.llm, id, draft.proposal, draft.files, problems)
        except tuple(FINAL) as error:
            raise DraftRejected(FINAL[type(error)], str(error), draft) from None

    def _problems(self, id: str, draft: Draft, novelty: Callable[[Draft], str | None]) -> tuple[str, list[str]]:
        """Cheapest first: the reviewer is paid only for what syntax has nothing against."""
        if reason := novelty(draft):
            return "duplicate", [f"this package repeats another candidate: {reason}. Write what the proposal changes"]
        if found := gate.check_files(draft.files):
            return "gate", [str(f) for f in found]
        if found := review.mismatches(draft.proposal, draft.files):
            return "inconsistent", found
        return "inconsistent", review.review(self.llm, id, draft.proposal, draft.files)
