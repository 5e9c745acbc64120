"""With a copy of this folder on PYTHONPATH, workers hand in results that lie ready in it (`prepared.py`)."""
import sys

if "poise_hpc.worker" in sys.orig_argv:
    from poise_hpc import worker

    worker.WORK = dict.fromkeys(worker.WORK, "prepared:work")
