"""`poise-hpc`: a command parses, calls, prints. Exit codes: 0 done or progressed; 1 a runtime failure, named; 2 usage or
config error; 3 the campaign needs a person (something is held). This file is the list of commands, by topic."""
from __future__ import annotations

import sys
from io import TextIOWrapper

import click

from .. import __version__
from . import again, exporting, looking, planning, running, steering, stores, tools
from .common import Group
from .driving import Progress, build

__all__ = ["Progress", "build", "main"]


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="poise-hpc")
def main() -> None:
    """Discover policy-optimization algorithms for language models (POISE), on a laptop or a SLURM cluster.

    \b
    Type first, from a clone of the repository (ten minutes on 2 cores):
      poise-hpc run archive_store/first --config configs/demo.yaml
      poise-hpc leaderboard archive_store/first

    CAMPAIGN is a folder that holds one search and its archive; CANDIDATE is an algorithm in it, c0003. Every command has --help.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that lacks a letter is no reason to stop
            stream.reconfigure(errors="backslashreplace")


@click.group(cls=Group)
def archive() -> None:
    """Verify the HDF5 records, rebuild their index, pack a campaign into one file."""


@click.group(cls=Group)
def data() -> None:
    """Problem sets of the mathematics task, pinned by hash."""


main.under("Run", planning.config, planning.plan, running.run, running.step, tools.doctor)
main.under("Look", looking.status, looking.watch, looking.leaderboard, looking.show, looking.logs, looking.report, planning.catalogue)
main.under("Test what was found", again.confirm, again.ablate, again.control, again.transfer, again.rerun, again.replay)
main.under("Take a winner along", exporting.export)
main.under("Your own algorithm", tools.check, steering.add)
main.under("Guide the search", steering.directive, steering.idea, steering.pin, steering.veto)
main.under("Stop and go on", steering.hold, steering.retry, steering.drain, steering.cancel)
main.under("Files", archive, data)
archive.under("Commands", stores.verify, stores.rebuild, stores.pack)
data.under("Commands", stores.fetch, stores.import_set, stores.verify_sets)
