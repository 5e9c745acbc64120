"""ShinkaEvolve with a no-op evaluation on Slurm, for `bench_slurm.py`; run by an interpreter that has `shinka-evolve`.

    run_shinka.py FOLDER URL CANDIDATES IN_FLIGHT SECONDS CORES

FOLDER: an empty one. URL: an OpenAI-compatible server that answers with a whole program. SECONDS: an evaluation sleeps. CORES: what it is told of this
machine, since it has no more jobs on a cluster than cores where it runs; 0: the truth. Embeddings, the novelty check and summaries are off.
The last line of stdout is what was measured, as JSON.
"""
import json
import os
import sqlite3
import sys
import time
from importlib.metadata import version
from pathlib import Path

folder, url, candidates, in_flight, seconds, cores = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
if cores:
    os.cpu_count = lambda: cores

from shinka.core import EvolutionConfig, ShinkaEvolveRunner  # noqa: E402
from shinka.database import DatabaseConfig  # noqa: E402
from shinka.launch import SlurmCondaJobConfig  # noqa: E402

EVALUATE = f"""
import json, sys, time
time.sleep({seconds})
program, results = sys.argv[2], sys.argv[4]  # --program_path P --results_dir R
score = len(open(program).read()) % 97 / 97
json.dump(dict(combined_score=score, public=dict(), private=dict()), open(results + "/metrics.json", "w"))
json.dump(dict(correct=True, error=None), open(results + "/correct.json", "w"))
"""
INITIAL = "# EVOLVE-BLOCK-START\ndef answer():\n    return 0\n# EVOLVE-BLOCK-END\n"

(folder / "evaluate.py").write_text(EVALUATE)
(folder / "initial.py").write_text(INITIAL)
runner = ShinkaEvolveRunner(
    EvolutionConfig(job_type="slurm_conda", num_generations=candidates, init_program_path=str(folder / "initial.py"), results_dir=str(folder / "results"),
                    patch_types=["full"], patch_type_probs=[1.0], llm_models=[f"local/m@{url}"], llm_dynamic_selection=None, meta_rec_interval=None,
                    embedding_model=None),
    SlurmCondaJobConfig(eval_program_path=str(folder / "evaluate.py"), partition="main", time="00:10:00", cpus=1, gpus=0, mem="500M"),
    DatabaseConfig(), max_evaluation_jobs=in_flight, max_proposal_jobs=in_flight, max_db_workers=4, verbose=False)
begun, cpu = time.perf_counter(), time.process_time()
runner.run()
wall, cpu = time.perf_counter() - begun, time.process_time() - cpu
(database,) = folder.glob("results/*.sqlite")
with sqlite3.connect(database) as programs:  # the initial program is generation 0, once an island
    times = [t for (t,) in programs.execute("SELECT timestamp FROM programs WHERE correct AND generation > 0")]
print(json.dumps({"version": version("shinka-evolve"), "times": sorted(times), "seconds": wall, "cpu_s": cpu, "in_flight": runner.max_evaluation_jobs}))
sys.stdout.flush()
os._exit(0)  # what is left is the teardown of its libraries
