"""OpenEvolve with a no-op evaluation, for `bench_slurm.py`; run by an interpreter that has `openevolve`.

    run_openevolve.py FOLDER URL CANDIDATES IN_FLIGHT SECONDS

It has no Slurm executor: candidates are evaluated in its pool of IN_FLIGHT processes. FOLDER: an empty one. URL: an
OpenAI-compatible server that answers with a whole program. SECONDS: an evaluation sleeps. The last line of stdout is what was measured, as JSON.
"""
import asyncio
import json
import multiprocessing
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

from openevolve.config import Config, DatabaseConfig, EvaluatorConfig, LLMConfig
from openevolve.controller import OpenEvolve

EVALUATE = """
import time
def evaluate(program):
    time.sleep({seconds})
    with open(__file__ + ".times", "a") as times:
        print(time.time(), file=times)
    return dict(combined_score=len(open(program).read()) % 97 / 97)
"""
INITIAL = "# EVOLVE-BLOCK-START\ndef answer():\n    return 0\n# EVOLVE-BLOCK-END\n"


def main() -> None:
    folder, url, candidates, in_flight, sleep = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
    (folder / "evaluate.py").write_text(EVALUATE.format(seconds=sleep))
    (folder / "initial.py").write_text(INITIAL)
    config = Config(max_iterations=candidates, checkpoint_interval=100, log_level="WARNING", diff_based_evolution=False,
                    llm=LLMConfig(primary_model="m", api_base=url, api_key="none"), database=DatabaseConfig(population_size=10_000),
                    evaluator=EvaluatorConfig(cascade_evaluation=False, parallel_evaluations=in_flight))
    evolution = OpenEvolve(str(folder / "initial.py"), str(folder / "evaluate.py"), config, output_dir=str(folder / "out"))
    begun, cpu = time.perf_counter(), os.times()
    asyncio.run(evolution.run())
    seconds = time.perf_counter() - begun
    for process in multiprocessing.active_children():
        process.join()
    after = os.times()
    times = [float(line) for line in (folder / "evaluate.py.times").read_text().splitlines()]  # the first is the initial program
    print(json.dumps({"version": version("openevolve"), "times": sorted(times)[1:], "seconds": seconds, "cpu_s": sum(after[:4]) - sum(cpu[:4]),
                      "in_flight": in_flight}))


if __name__ == "__main__":
    main()
