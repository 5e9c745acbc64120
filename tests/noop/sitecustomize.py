"""With this folder on PYTHONPATH, workers run `steps.work` in place of checks, training and evaluation: everything around
them (scheduler, supervisor, claims, signals, files, archive) is real."""
import sys

if any("poise_hpc" in argument for argument in sys.orig_argv):
    from poise_hpc import worker

    worker.WORK = dict.fromkeys(worker.WORK, "steps:work")
