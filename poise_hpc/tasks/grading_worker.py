r"""math-verify in a process that may be killed: (gold, answer) lines in, true or false lines out.

    python -m poise_hpc.tasks.grading_worker SECONDS

A hostile answer (9^{9^{9^9}}) can keep sympy busy for ever, inside one C call that no Python handler interrupts. So the
kernel holds the stopwatch: a timer whose signal has its default action, death. It counts CPU time, so a busy machine
does not turn right answers into timeouts; a second one counts ten times as much wall time. The parent sees the end of
file and starts another process. If the parent dies, input ends and this process does too.
"""
from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from importlib.metadata import version

MEMORY_BYTES = 4 << 30


def main(seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever the libraries print is not a reply
    logging.disable()
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    box = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    print(json.dumps(version("math-verify")), file=replies)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
        # Its own timeouts are off: they need a Python handler, and these timers.
        gold, answer = (parse(r"\boxed{" + text + "}", box, parsing_timeout=None) for text in json.loads(line))
        equal = bool(gold and answer and verify(gold, answer, timeout_seconds=None))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(equal), file=replies)


if __name__ == "__main__":
    main(float(sys.argv[1]))
