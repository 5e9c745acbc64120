"""A controller at work in this process: built, its endpoint looked at, told to stop by signals, watched."""
from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..types import PoiseError, UsageError
from .common import HELD


def examine(root: Path, config_file: Path | None, max_candidates: int | None, site_file: Path | None, force: bool) -> tuple[Any, Any]:
    """The campaign, None if there is none yet; and the config for it, None where an existing one's holds. UsageError for what
    cannot be, before anything is written. `force`: although a GPU's memory will not do."""
    from .. import config as configuration
    from .. import access, packages, site
    from ..campaign import Campaign
    from ..rollout.base import check_installed
    from ..settings import overlay
    from ..tasks.base import load_task

    config = configuration.load(config_file) if config_file else None
    if max_candidates is not None:
        base = config or (Campaign.open(root).config if (root / "campaign.json").exists() else configuration.Config())
        config = configuration.parse(overlay(base.dump(), {"search": {"candidates": max_candidates}}))
    if (root / "campaign.json").exists():
        opened = Campaign.open(root)
        opened.changes(config or opened.config)
        if not opened.archived_ids():  # later it is known to fit
            fit(config or opened.config, site_file or (root / "site.yaml"), force)
        return opened, config
    config = config or configuration.Config()
    load_task(config)
    if config.search.proposer == "llm":  # without the key no controller could be built
        access.read_key(config.agent, os.environ)
    packages.baseline(config.search.baseline)
    if config.model.path is not None and not (Path(config.model.path) / "config.json").is_file():
        raise UsageError(f"model.path: {config.model.path} is no Hugging Face model folder (it has no config.json)")
    nodes = site.load(site_file) if site_file else None
    if nodes is None or not (nodes.python or nodes.container):  # else the jobs' environment is another: the prepare job looks there
        check_installed(config)
    fit(config, site_file, force)
    return None, config


def create(root: Path, config: Any, cache_dir: Path | None) -> Any:
    """A new campaign, and its folder for warm-started models."""
    from ..campaign import Campaign

    cache = Path(os.path.abspath(cache_dir or Path.home() / ".cache" / "poise_hpc"))
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PoiseError(f"cannot create the cache folder {cache}: {error.strerror}. Give another with --cache-dir") from None
    return Campaign.create(root, config, cache_dir=str(cache))


def fit(config: Any, site_file: Path | None, force: bool) -> None:
    """Refuse what cannot fit the nodes and the GPUs that the site file describes; warn of what is tight."""
    if site_file is None or not site_file.exists():
        return
    from .. import site
    from ..planning import plan

    described = site.load(site_file)
    site.check_ranks(described, config.jobs.ranks, config.rollout.tensor_parallel)
    if warning := plan.check(config, described, force):
        click.echo(warning, err=True)


def build(campaign: Any, say: Callable[[str], None], thinks: bool = True) -> Any:
    """The campaign's controller. `thinks=False`: for carrying out orders only, where there may be no endpoint and no key."""
    from ..agent.offline import OfflineProposer
    from ..cluster.base import for_campaign
    from ..controller import Controller

    llm = thinks and campaign.config.search.proposer == "llm"
    return Controller(campaign, for_campaign(campaign), llm_proposer(campaign) if llm else OfflineProposer(), say=say, threads=llm)


def llm_proposer(campaign: Any) -> Any:
    """The language model; in a replay, what it once said."""
    from ..agent.llm_proposer import LLMProposer
    from ..llm import Client
    from ..replay import Replay
    from ..transcript import Transcript

    settings, transcript = campaign.config.agent, Transcript(campaign.root / "llm.jsonl", time.time)
    llm = Replay(settings, transcript) if "replay_of" in campaign.meta else Client(settings, transcript, seed=campaign.config.search.seed)
    return LLMProposer(llm, campaign.config, campaign.root)


@contextmanager
def driving(campaign: Any, config: Any, site_file: Path | None) -> Iterator[Any]:
    """The campaign's lock; under it a new config and site file are taken over: a controller that is refused has changed nothing."""
    from ..proposing import ENDED

    with campaign.lock() as lock:
        if config is not None:
            campaign.adopt(config)
        if site_file is not None:
            campaign.set_site(site_file)
        (campaign.root / ENDED).unlink(missing_ok=True)
        yield lock


def drive(campaign: Any, as_json: bool, config: Any = None, site_file: Path | None = None) -> Any:
    """Loop until the campaign is done or held; the controller that did it."""
    from .. import controller as loop

    with driving(campaign, config, site_file) as lock:
        controller = build(campaign, say=lambda line: click.echo(line, err=as_json))
        if "replay_of" not in campaign.meta and controller.thinking.threads and (unlimited := campaign.config.agent.unlimited):
            click.echo(f"warning: {unlimited}", err=True)
        if look(campaign, controller):
            stop_on_signal(controller)
            loop.drive(controller, time.sleep, lock, watch=Progress(campaign, quiet=as_json))
        note_end(campaign, controller)
    return controller


def look(campaign: Any, controller: Any) -> bool:
    """Before the first reply, and before anything is submitted: one free call to the endpoint. False: a person must look. An endpoint that
    is away, or has no list of models, may be there when it is needed."""
    from ..llm import served_models
    from ..replay import LLMError, Rejected
    from ..transcript import Transcript

    if not controller.thinking.threads or "replay_of" in campaign.meta or Transcript(campaign.root / "llm.jsonl", time.time).answered:
        return True
    agent = campaign.config.agent
    try:
        served = served_models(agent)
    except Rejected as error:
        controller.thinking.blocked = str(error)
        controller.event("campaign", "agent blocked", f"{error}; run again after that")
        return False
    except LLMError as error:
        click.echo(f"warning: {error}. Check agent.base_url; the campaign goes on, and asks it again when the baseline is done", err=True)
        return True
    if missing := sorted({m for models in agent.models.values() for m in models}.difference(served)):
        click.echo(f"warning: the endpoint does not list {', '.join(missing)} (agent.models); it lists {', '.join(served[:10])}", err=True)
    return True


def note_end(campaign: Any, controller: Any) -> None:
    """For `status`, what no other file says: why nothing more is asked."""
    from .. import files
    from ..proposing import ENDED

    said = {"spent": controller.proposing.spent, "blocked": controller.thinking.blocked}
    if any(said.values()):
        files.write_json(campaign.root / ENDED, said)


def stop_on_signal(controller: Any) -> None:
    """Ctrl-C, TERM and a closed terminal: ask this host's jobs to save and stop (a scheduler's go on), then leave. The next `run` goes on from there."""
    from .. import orders, wording

    def leave(number: int, frame: Any) -> None:
        asked = orders.tell(controller, [a for _, a in controller.in_flight()] if controller.cluster.on_this_host else [])
        controller.event("campaign", "stopped", f"by signal {number}; {wording.count(asked, 'job')} asked to save and stop. The same command goes on")
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, leave)


class Progress:
    """Every few seconds: what runs, how far it is, and when the campaign will be done."""

    def __init__(self, campaign: Any, quiet: bool, every_s: float = 5.0):
        self.campaign, self.quiet, self.every_s = campaign, quiet, every_s
        self.last = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if self.quiet or now - self.last < self.every_s:
            return
        self.last = now
        from .. import views

        data = views.status(self.campaign, spending=False)
        b = data["budget"]
        jobs = "; ".join(views.at_work_texts(data)) or "no job is running"
        click.echo(f"  .. archived {b['archived']}/{b['expected']}{views.eta_text(b)}  |  {jobs}")


def held_exit(controller: Any) -> None:
    if controller.thinking.blocked:
        click.echo(f"held: the agent: {controller.thinking.blocked}", err=True)
        sys.exit(HELD)
    if controller.held:
        for candidate in controller.held:
            click.echo(f"held: {candidate.id} at {candidate.held_from}: {candidate.cause}: {candidate.message}", err=True)
        sys.exit(HELD)
