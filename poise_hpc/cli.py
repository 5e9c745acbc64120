"""`poise-hpc`: a command parses, calls, prints. Exit codes: 0 done or progressed; 1 a runtime failure, named; 2 usage or
config error; 3 the campaign needs a person (something is held)."""
from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from . import __version__
from .types import PoiseError, UsageError

FOLDER = click.Path(path_type=Path)
HELD = 3


class Command(click.Group):
    """Turns our errors into one line and an exit code; a traceback is a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except BrokenPipeError:  # `| head`: click's own affair
            raise
        except (PoiseError, OSError) as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)


@click.group(cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="poise-hpc")
def main() -> None:
    """Discover policy-optimization algorithms for language models (POISE), on a laptop or a SLURM cluster."""


def as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON.")(command)


def emit(data: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    click.echo(json.dumps(data, indent=2, default=str) if as_json else text(data))


# --- drive a campaign

@main.command()
@click.argument("campaign", type=FOLDER)
@click.option("--config", "config_file", type=FOLDER, help="YAML; defaults are the base lab.")
@click.option("--site", "site_file", type=FOLDER, help="Site file: where jobs run. Kept in the campaign; without one, this host.")
@click.option("--max-candidates", type=click.IntRange(0), help="Raise or lower search.candidates.")
@click.option("--dry-run", is_flag=True, help="Print what would be submitted, and submit nothing.")
@click.option("--cache-dir", type=FOLDER, envvar="POISE_CACHE_DIR", help="Warm-started models. [~/.cache/poise_hpc]")
@as_json
def run(campaign: Path, config_file: Path | None, site_file: Path | None, max_candidates: int | None, dry_run: bool,
        cache_dir: Path | None, as_json: bool) -> None:
    """Create CAMPAIGN if it is new, then loop until its budget is spent. Safe to kill and repeat."""
    from . import views
    from .controller import drive

    if dry_run:
        from . import standalone

        return emit(standalone.dry_run(campaign, config_file, site_file), as_json, standalone.dry_run_text)
    opened, config = open_or_create(campaign, config_file, max_candidates, cache_dir)
    with opened.lock() as lock:  # first: a controller that is refused has changed nothing
        if config is not None:
            opened.adopt(config)
        if site_file is not None:
            opened.set_site(site_file)
        controller = build(opened, say=lambda line: click.echo(line, err=as_json))
        stop_on_signal(controller)
        drive(controller, time.sleep, lock, watch=Progress(opened, quiet=as_json))
    data = views.leaderboard(opened)
    emit(data, as_json, views.leaderboard_text)
    held_exit(controller)


@main.command()
@click.argument("campaign", type=FOLDER)
@as_json
def step(campaign: Path, as_json: bool) -> None:
    """Go on as far as is possible now, for cron, scrontab or a self-resubmitting job. With an LLM it waits for the calls it makes."""
    from . import views
    from .campaign import Campaign
    from .controller import drive

    opened = Campaign.open(campaign)
    with opened.lock() as lock:
        controller = build(opened, say=lambda line: click.echo(line, err=as_json))
        while controller.step():  # until nothing moves: the next call may be minutes away
            lock.touch()
        if controller.thinking.threads:  # what the agent was asked for is waited for, and taken
            controller.thinking.settle(lock.touch)
            controller.step()
        if controller.finished:
            drive(controller, time.sleep, lock)  # the scheduler's queue is to hold nothing of it
    emit(views.status(opened), as_json, views.status_text)
    held_exit(controller)


def open_or_create(root: Path, config_file: Path | None, max_candidates: int | None, cache_dir: Path | None) -> tuple[Any, Any]:
    """The campaign, and the config that an existing one is to adopt."""
    from . import config as configuration
    from . import packages
    from .campaign import Campaign
    from .tasks.base import load_task

    config = configuration.load(config_file) if config_file else None
    if max_candidates is not None:
        base = config or (Campaign.open(root).config if (root / "campaign.json").exists() else configuration.Config())
        config = configuration.parse(configuration.overlay(base.dump(), {"search": {"candidates": max_candidates}}))
    if (root / "campaign.json").exists():
        return Campaign.open(root), config
    config = config or configuration.Config()
    # A wrong task, option, split, baseline or model folder: said before anything is created.
    load_task(config)
    packages.baseline(config.search.baseline)
    if config.model.path is not None and not (Path(config.model.path) / "config.json").is_file():
        raise UsageError(f"model.path: {config.model.path} is no Hugging Face model folder (it has no config.json)")
    cache = Path(os.path.abspath(cache_dir or Path.home() / ".cache" / "poise_hpc"))
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PoiseError(f"cannot create the cache folder {cache}: {error.strerror}. Give another with --cache-dir") from None
    return Campaign.create(root, config, cache_dir=str(cache)), None


def build(campaign: Any, say: Callable[[str], None], thinks: bool = True) -> Any:
    """The campaign's controller. `thinks=False`: for carrying out orders only, where there may be no endpoint and no key."""
    from .agent.offline import OfflineProposer
    from .cluster import for_campaign
    from .controller import Controller

    llm = thinks and campaign.config.search.proposer == "llm"
    return Controller(campaign, for_campaign(campaign), llm_proposer(campaign) if llm else OfflineProposer(), say=say, threads=llm)


def llm_proposer(campaign: Any) -> Any:
    """The language model; in a replay, what it once said."""
    from .agent.llm_proposer import LLMProposer
    from .llm import Client
    from .replay import Replay
    from .transcript import Transcript

    settings, transcript = campaign.config.agent, Transcript(campaign.root / "llm.jsonl", time.time)
    llm = Replay(settings, transcript) if "replay_of" in campaign.meta else Client(settings, transcript, seed=campaign.config.search.seed)
    return LLMProposer(llm, campaign.config, campaign.root)


def stop_on_signal(controller: Any) -> None:
    """Ctrl-C, TERM and a closed terminal: ask this host's jobs to save and stop (a scheduler's go on), then leave. The next `run` goes on from there."""
    def leave(number: int, frame: Any) -> None:
        running = [controller.submitted(a) for _, a in controller.in_flight()] if controller.cluster.on_this_host else []
        controller.cluster.cancel(running)
        controller.event("campaign", "stopped", f"by signal {number}; {len(running)} jobs asked to save and stop")
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, leave)


class Progress:
    """Every few seconds: what runs, how far it is, and when the campaign will be done."""

    def __init__(self, campaign: Any, quiet: bool, every_s: float = 5.0):
        self.campaign, self.quiet, self.every_s = campaign, quiet, every_s
        self.last = self.begun = time.monotonic()
        self.archived_at_start: int | None = None

    def __call__(self) -> None:
        now = time.monotonic()
        if self.quiet or now - self.last < self.every_s:
            return
        self.last = now
        from . import views

        data = views.status(self.campaign, spending=False)
        b = data["budget"]
        if self.archived_at_start is None:
            self.archived_at_start = b["archived"]
        done = b["archived"] - self.archived_at_start
        left = b["expected"] - b["archived"]
        eta = f"  campaign ETA {(now - self.begun) * left / done / 60:.1f} min" if done else ""
        jobs = "; ".join(views.progress_text(r) for r in data["running"])
        click.echo(f"  .. archived {b['archived']}/{b['expected']}{eta}  |  {jobs}")


def held_exit(controller: Any) -> None:
    if controller.thinking.blocked:
        click.echo(f"held: the agent: {controller.thinking.blocked}", err=True)
        sys.exit(HELD)
    if controller.held:
        for candidate in controller.held:
            click.echo(f"held: {candidate.id} at {candidate.held_from}: {candidate.cause}: {candidate.message}", err=True)
        sys.exit(HELD)


# --- look at it

@main.command()
@click.argument("campaign", type=FOLDER)
@as_json
def status(campaign: Path, as_json: bool) -> None:
    """Where the campaign is: budget, candidates, running jobs."""
    from . import views
    from .campaign import Campaign

    emit(views.status(Campaign.open(campaign)), as_json, views.status_text)


@main.command()
@click.argument("campaign", type=FOLDER)
@click.option("--every", default=2.0, show_default=True, help="Seconds between looks.")
@as_json
def watch(campaign: Path, every: float, as_json: bool) -> None:
    """`status` again and again, until the campaign is done. With --json: one line a look."""
    from . import views
    from .campaign import Campaign

    opened = Campaign.open(campaign)
    while True:
        data = views.status(opened)
        if not as_json:
            click.clear()
        click.echo(json.dumps(data, default=str) if as_json else views.status_text(data))
        if data["done"]:
            return
        time.sleep(every)


@main.command()
@click.argument("campaign", type=FOLDER)
@as_json
def leaderboard(campaign: Path, as_json: bool) -> None:
    """Archived candidates by score, with intervals and paired differences to the baseline."""
    from . import views
    from .campaign import Campaign

    emit(views.leaderboard(Campaign.open(campaign)), as_json, views.leaderboard_text)


@main.command()
@click.argument("campaign", type=FOLDER)
@click.argument("candidate")
@as_json
def show(campaign: Path, candidate: str, as_json: bool) -> None:
    """Everything about one candidate: proposal, parent choice, score, reflection, attempts."""
    from . import views
    from .campaign import Campaign

    emit(views.show(Campaign.open(campaign), candidate), as_json, views.show_text)


@main.command()
@click.argument("campaign", type=FOLDER)
@click.argument("candidate")
@click.option("--lines", default=40, show_default=True, help="Of each attempt's log.")
@as_json
def logs(campaign: Path, candidate: str, lines: int, as_json: bool) -> None:
    """The logs of a candidate's attempts (`prepare`: the campaign's own job)."""
    from . import views
    from .campaign import Campaign

    emit(views.logs(Campaign.open(campaign), candidate, lines), as_json, views.logs_text)


# --- change it

@main.command()
@click.argument("campaign", type=FOLDER)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--parent", help="Candidate it descends from.")
@as_json
def add(campaign: Path, folder: Path, parent: str | None, as_json: bool) -> None:
    """Put an own algorithm package into the pipeline: the same checks, training, evaluation and archive."""
    from . import orders
    from .campaign import Campaign

    opened = Campaign.open(campaign)
    if parent is not None:
        opened.load(parent)
    emit({"inbox": str(orders.package(opened, folder, parent))}, as_json,
         lambda d: f"{folder} is in the inbox; `poise-hpc run {campaign}` takes it up")


def order_command(kind: str, text: str, whole: bool) -> None:
    @main.command(name=kind, help=text)
    @click.argument("campaign", type=FOLDER)
    @click.argument("candidate", required=not whole)
    @as_json
    def command(campaign: Path, candidate: str | None, as_json: bool) -> None:
        from . import orders
        from .campaign import Campaign
        from .types import Stage

        opened = Campaign.open(campaign)
        if candidate not in (None, "prepare") and opened.load(candidate).stage == Stage.ARCHIVED:
            raise UsageError(f"{candidate} is archived: there is nothing to {kind}")
        orders.give(opened, kind, candidate)
        settle(opened, as_json)


order_command("retry", "Go on with what is held: one CANDIDATE, or all.", whole=True)
order_command("hold", "Stop one CANDIDATE's jobs; it waits for `retry`.", whole=False)
order_command("cancel", "Stop this campaign's jobs (or one CANDIDATE's) and propose nothing new; `retry` goes on, `drain --off` proposes again.", whole=True)


@main.command()
@click.argument("campaign", type=FOLDER)
@click.option("--off", is_flag=True, help="Propose again.")
@as_json
def drain(campaign: Path, off: bool, as_json: bool) -> None:
    """Finish what runs, propose nothing new."""
    from . import orders
    from .campaign import Campaign

    opened = Campaign.open(campaign)
    orders.give(opened, "resume" if off else "drain")
    settle(opened, as_json)


@main.command()
@click.argument("campaign", type=FOLDER)
@click.argument("text")
@as_json
def directive(campaign: Path, text: str, as_json: bool) -> None:
    """What the search is to aim at from now on, in a sentence; "" ends it."""
    from . import guidance

    named = guidance.objectives(text)
    tell(campaign, "directive", text, as_json)
    click.echo(f"selection also weighs: {', '.join(named) or 'nothing new; it knows the words of length and cost'}", err=as_json)


@main.command()
@click.argument("campaign", type=FOLDER)
@click.argument("text")
@as_json
def idea(campaign: Path, text: str, as_json: bool) -> None:
    """A suggestion that the language model works out next."""
    from .campaign import Campaign

    if Campaign.open(campaign).config.search.proposer != "llm":
        raise UsageError("only a language model can read an idea (search.proposer: llm); `poise-hpc add` takes code")
    tell(campaign, "idea", text, as_json)


@main.command()
@click.argument("campaign", type=FOLDER)
@click.argument("candidate", required=False)
@click.option("--off", is_flag=True, help="Choose parents again.")
@as_json
def pin(campaign: Path, candidate: str | None, off: bool, as_json: bool) -> None:
    """Make CANDIDATE the parent of all that is proposed from now on."""
    from .archive import ArchiveView
    from .campaign import Campaign

    Campaign.open(campaign)
    if off == bool(candidate):
        raise UsageError("give a candidate, or --off")
    if candidate and not any(e.id == candidate and e.score for e in ArchiveView.load(campaign).entries):
        raise UsageError(f"{candidate} has no score in the archive; `poise-hpc leaderboard {campaign}` lists those that have")
    tell(campaign, "pin", candidate or "", as_json)


@main.command()
@click.argument("campaign", type=FOLDER)
@click.argument("what")
@click.option("--off", is_flag=True, help="Allow it again.")
@as_json
def veto(campaign: Path, what: str, off: bool, as_json: bool) -> None:
    """Never again WHAT: a candidate as parent, or a mechanism in a parent or a proposal."""
    from .types import BASELINE_ID

    if what == BASELINE_ID:
        raise UsageError(f"{BASELINE_ID} stays a possible parent: something must remain")
    tell(campaign, "veto", what, as_json, off)


def tell(campaign: Path, kind: str, text: str, as_json: bool, off: bool = False) -> None:
    from . import orders
    from .campaign import Campaign

    opened = Campaign.open(campaign)
    orders.give(opened, kind, text=text, off=off)
    settle(opened, as_json)


def settle(campaign: Any, as_json: bool = False) -> None:
    """Carry the order out here, unless a controller is at work, which then does it within a second."""
    from . import orders
    from .campaign import CampaignBusy

    try:
        with campaign.lock():
            orders.obey(build(campaign, say=lambda line: click.echo(line, err=as_json), thinks=False))
        data = {"carried_out": True, "by": "this command"}
    except CampaignBusy:
        data = {"carried_out": False, "by": "the running controller, at its next step"}
    emit(data, as_json, lambda d: "done" if d["carried_out"] else f"this will be carried out by {d['by']}")


@main.command()
@click.option("--site", "site_file", type=FOLDER, help="Site file: also look at its Slurm, and from two of its nodes.")
@click.option("--config", "config_file", type=FOLDER, help="YAML: also its ranks, model, data and agent.")
@click.option("--folder", type=FOLDER, default=".", help="Where campaigns are to be. [.]")
@click.option("--job/--no-job", default=True, help="Run a tiny job on two nodes.")
@click.option("--wait-min", default=10.0, show_default=True, help="For that job.")
@as_json
def doctor(site_file: Path | None, config_file: Path | None, folder: Path, job: bool, wait_min: float, as_json: bool) -> None:
    """Would a campaign run here? Every finding that is not ok says how to cure it."""
    from . import doctor as surgery

    data = surgery.examine(site_file, config_file, folder.absolute(), job, wait_min, say=lambda line: click.echo(line, err=True))
    emit(data, as_json, surgery.text)
    sys.exit(1 if data["failed"] else 0)


# --- one algorithm, without a campaign

@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@as_json
def check(folder: Path, as_json: bool) -> None:
    """Static gate and contract checks of an algorithm package, isolated as a job would be."""
    from . import standalone

    data = standalone.check(folder)
    emit(data, as_json, standalone.check_text)
    sys.exit(0 if data["outcome"] == "succeeded" else 1)


# --- again, on fresh seeds, without a mechanism, elsewhere

def derived_command(kind: str, text: str, config_needed: bool = False) -> None:
    @main.command(name=kind, help=text)
    @click.argument("campaign", type=FOLDER)
    @click.argument("candidate")
    @click.option("--seeds", type=click.IntRange(1), help="Number of paired training seeds.")
    @click.option("--config", "config_file", type=FOLDER, required=config_needed, help="Another setting to run in.")
    @as_json
    def command(campaign: Path, candidate: str, seeds: int | None, config_file: Path | None, as_json: bool) -> None:
        from . import derived
        from .campaign import Campaign
        from .controller import drive

        target = derived.create(kind, Campaign.open(campaign), candidate, seeds, config_file)
        with target.lock() as lock:
            controller = build(target, say=lambda line: click.echo(line, err=as_json))
            stop_on_signal(controller)
            drive(controller, time.sleep, lock, watch=Progress(target, quiet=as_json))
        emit(derived.report(kind, target), as_json, derived.report_text)
        held_exit(controller)


derived_command("rerun", "Train and evaluate an entry again from its record alone, and compare the numbers.")
derived_command("confirm", "A winner against the baseline on fresh seeds and on prompts that selection never saw.")
derived_command("ablate", "A winner with each of its mechanisms switched off in turn, paired seeds.")
derived_command("transfer", "A winner against the baseline in another setting (--config).", config_needed=True)


@main.command()
@click.argument("campaign", type=FOLDER)
@click.argument("new", type=FOLDER)
@as_json
def replay(campaign: Path, new: Path, as_json: bool) -> None:
    """Run a finished LLM campaign again as NEW, from its transcript: no endpoint, no cost; and compare the archives."""
    from . import replaying
    from .campaign import Campaign
    from .controller import drive

    origin = Campaign.open(campaign)
    target = replaying.create(origin, new)
    with target.lock() as lock:
        controller = build(target, say=lambda line: click.echo(line, err=as_json))
        stop_on_signal(controller)
        drive(controller, time.sleep, lock, watch=Progress(target, quiet=as_json))
    held_exit(controller)
    data = replaying.compare(origin, target)
    emit(data, as_json, replaying.compare_text)
    sys.exit(1 if data["different"] else 0)


# --- the archive

@main.group()
def archive() -> None:
    """Write-once HDF5 records and their rebuildable index."""


@archive.command()
@click.argument("campaign", type=FOLDER)
@as_json
def verify(campaign: Path, as_json: bool) -> None:
    """Read every record and compare its content with its hash."""
    from .archive import verify_campaign
    from .campaign import Campaign

    problems = verify_campaign(Campaign.open(campaign).root)
    emit({"campaign": str(campaign), "problems": problems}, as_json,
         lambda d: "\n".join(f"{id}: {text}" for id, texts in d["problems"].items() for text in texts) +
         ("\nmove a damaged record away, and `poise-hpc run` writes it again from the candidate's folder" if d["problems"] else "every record is whole"))
    sys.exit(1 if problems else 0)


@archive.command()
@click.argument("campaign", type=FOLDER)
@as_json
def rebuild(campaign: Path, as_json: bool) -> None:
    """Make index.h5 anew from the records."""
    from .archive import rebuild as rebuild_index
    from .campaign import Campaign

    view = rebuild_index(Campaign.open(campaign).root)
    emit({"indexed": len(view.entries), "problems": view.problems}, as_json,
         lambda d: "\n".join([f"{d['indexed']} records indexed", *(f"{id}: {text}" for id, text in d["problems"].items())]))
    sys.exit(1 if view.problems else 0)


# --- problem sets

@main.group()
def data() -> None:
    """Problem sets of the mathematics task: canonical files, pinned by hash."""


REPLACE = click.option("--replace", is_flag=True, help="Another content under a name that is there already.")


@data.command()
@click.argument("name")
@click.argument("folder", type=FOLDER)
@REPLACE
@as_json
def fetch(name: str, folder: Path, replace: bool, as_json: bool) -> None:
    """Download the published set NAME from the Hugging Face hub into FOLDER. Needs internet."""
    from . import data as sets

    emit(sets.fetch(name, folder, replace=replace), as_json, lambda e: f"{name}: {e['count']} problems  sha256 {e['sha256']}  {e['licence']}")


@data.command(name="import")
@click.argument("name")
@click.argument("file", type=FOLDER)
@click.argument("folder", type=FOLDER)
@REPLACE
@as_json
def import_set(name: str, file: Path, folder: Path, replace: bool, as_json: bool) -> None:
    """Take FILE (.jsonl, .json or .parquet) into FOLDER as the set NAME."""
    from . import data as sets

    entry = sets.import_file(name, file, folder, replace=replace)
    emit(entry, as_json, lambda e: f"{name}: {e['count']} problems  sha256 {e['sha256']}  {e['licence']}")


@data.command(name="verify")
@click.argument("folder", type=FOLDER)
@as_json
def verify_sets(folder: Path, as_json: bool) -> None:
    """Compare every set in FOLDER with its lock; count duplicates and overlaps."""
    from . import data as sets

    report = sets.verify(folder)
    emit(report, as_json, sets.verify_text)
    sys.exit(1 if report["faults"] else 0)


if __name__ == "__main__":
    main()
