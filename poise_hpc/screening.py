"""Multi-fidelity screening: a candidate trains to a rung, a point of `evaluate.at`, and goes on only if it holds its own there.

    below_start   mean Overall over the rung's seeds < the untrained policy's - margin
    behind        upper confidence bound of the paired difference to the baseline, at the same point and seeds, < - margin

Both compare with what is fixed before the first candidate is proposed, never with other candidates: which of them go on does not
depend on the order in which jobs end. The baseline and persons' packages are not screened, so `rerun`, `confirm`, `ablate` and
`transfer` are not either. A rung saves a checkpoint; who goes on goes on from it, to the same bits.

Not covered: rules that see training curves. Training reward is no screen (docs/LAB.md), and entropy or gradients tell of a collapse when
it is there.
"""
from __future__ import annotations

from collections.abc import Mapping

from . import stats
from .campaign import Candidate
from .config import Config, Rung
from .types import BASELINE_ID, Outcome, Screening, Stage


def rung(config: Config, candidate: Candidate) -> Rung | None:
    """The rung that it trains to or is evaluated at; None: its training is whole, or will be."""
    left = config.screen.rungs[candidate.rung:] if candidate.stage in (Stage.TRAIN, Stage.EVALUATE) else ()
    return left[0] if left and candidate.id != BASELINE_ID and candidate.proposal().proposer != "person" else None


def judged(config: Config, candidate: Candidate) -> tuple[Rung, ...]:
    """The rungs that it has been judged at."""
    return config.screen.rungs[:candidate.rung + (candidate.outcome is Outcome.SCREENED_OUT)]


def judge(rung: Rung, ours: Mapping[str, float], baseline: Mapping[str, float], start: float) -> Screening:
    """`ours`, `baseline`: training seed -> Overall at the rung's point, of the same seeds. `start`: of the untrained policy."""
    overall, _ = stats.mean_interval(list(ours.values()))
    paired, bounded = (stats.paired_difference(ours, baseline, level) for level in (stats.LEVEL, 2 * rung.confidence - 1))
    assert paired is not None and bounded is not None
    behind = bounded[1][1] if bounded[1] else bounded[0]
    bound, limit = (overall, start - rung.margin) if rung.rule == "below_start" else (behind, 0.0 - rung.margin)
    return Screening(f"{rung.at:g}", rung.rule, bound >= limit, dict(ours), overall, start, *paired, bound, limit)


def text(s: Screening) -> str:
    """In a sentence."""
    at, seeds = percent(s.at), f"{len(s.by_seed)} seed" + "s" * (len(s.by_seed) > 1)
    span = f" [{s.delta_ci[0]:+.1f}, {s.delta_ci[1]:+.1f}]" if s.delta_ci else ""
    against = f"{s.delta:+.1f}{span} against {BASELINE_ID} on the same {seeds}"
    if s.rule == "below_start":
        return f"Overall {s.overall:.1f} at {at} of the training, {s.limit:.1f} is the limit: the untrained policy has {s.start:.1f}; {against}"
    return (f"{against} at {at} of the training, at most {s.bound:+.1f}, {s.limit:.1f} is the limit; Overall {s.overall:.1f}, "
            f"the untrained policy has {s.start:.1f}")


def percent(at: str) -> str:
    return f"{100 * float(at):g} %"
