"""What a person sees of a campaign: plain data first (`--json` prints it as it is), then text. Needs no torch."""
from __future__ import annotations

import shlex
import time
from typing import Any

from . import eta, files, jobspec, lock, screening, wording
from .archive import ArchiveView, read
from .campaign import Campaign, Candidate, load_attempts
from .jobs import latest_claim
from .transcript import pending
from .types import BASELINE_ID, START, EntrySummary, Outcome, Stage


def status(campaign: Campaign, now: float | None = None, spending: bool = True, archive: ArchiveView | None = None) -> dict[str, Any]:
    """`{campaign, done, driver, held, budget, inbox, candidates, running}`: the interface that scripts read. `spending`: also "llm"."""
    from .proposing import ENDED, exhausted, inbox

    now = time.time() if now is None else now
    archive = archive or ArchiveView.load(campaign.root)
    archived = {e.id for e in archive.entries}
    active = [campaign.load(id) for id in campaign.ids() if id not in archived]
    home = jobspec.home(campaign)
    rows = [archived_row(e) for e in archive.entries] + [active_row(c) for c in active]
    wanted = campaign.config.search.candidates
    made = sum(row["proposer"] not in ("person", "seed") for row in rows)
    seconds = sum(e.run_seconds for e in archive.entries) + sum(
        a.result.get("run_seconds", 0.0) * a.result.get("ranks", 1) for c in active for a in c.attempts if a.result)
    budget = campaign.config.budget
    driver, lost = lock.driver(campaign.root)
    ended = {} if driver else files.read_json(campaign.root / ENDED) or {}
    waiting = inbox(campaign)
    why = exhausted(campaign, archive, {c.id: c for c in active}, len(rows), now) or ("" if waiting else ended.get("spent", ""))
    expected = max(len(rows), 1) + len(waiting) + (0 if why else max(wanted - made, 0))
    spent = [e.run_seconds for e in archive.entries]
    # Of what is not archived yet, begun or not: each as costly as those that are. `poise-hpc plan` knows more.
    left = (expected - len(archived)) * sum(spent) / len(spent) / 3600 if spent else None
    at_work = [r for c in [home, *active] for r in running(c, now)]
    blocked = ended.get("blocked", "")
    soon = eta.campaign_left(campaign, archive.entries, active, at_work, expected - len(rows)) if home.stage == Stage.ARCHIVED and not blocked else None
    asked = [] if blocked or not (campaign.root / "llm.jsonl").exists() else [
        a for a in pending(campaign.root / "llm.jsonl") if a["candidate"] not in archived and (driver or a["error"])]
    return {
        "campaign": str(campaign.root), "home": home.stage, "driver": driver, "driver_lost": lost,
        "done": home.stage == Stage.ARCHIVED and bool(why) and not active, "proposing_ended": why,
        "held": [c.id for c in [home, *active] if c.stage == Stage.HELD], "agent_blocked": blocked,
        "budget": {"candidates": wanted, "proposed": made, "archived": len(archived), "expected": expected,
                   "screened_out": sum(row["screened"] is not None for row in rows),
                   "run_hours": round(seconds / 3600, 4), "run_hours_left": None if left is None else round(left, 4),
                   "run_hours_limit": budget.run_hours, "wall_clock_min": round((now - campaign.meta["created"]) / 60, 1),
                   "wall_clock_min_limit": budget.wall_clock_min, "eta_s": None if soon is None else round(soon, 1)},
        "inbox": [path.name.partition("-")[2] or path.name for path in waiting],
        "running": at_work, "asked": asked,
        "problems": _problems(archive),
        "candidates": rows} | ({"llm": llm_spending(campaign)} if spending and (campaign.root / "llm.jsonl").exists() else {})


def llm_spending(campaign: Campaign) -> dict[str, Any]:
    """Calls, tokens and cost by operator, and what the budget has left. Costs are decimal strings: they add up exactly."""
    from decimal import Decimal

    from .transcript import Amount, Transcript

    agent, transcript = campaign.config.agent, Transcript(campaign.root / "llm.jsonl", time.time)
    spent, calls = transcript.spent(), transcript.calls()
    total = sum(spent.values(), Amount())
    return {"calls": sum(calls.values()), "tokens": total.tokens, "cost": str(total.cost),
            "tokens_left": None if agent.budget_tokens is None else agent.budget_tokens - total.tokens,
            "cost_left": None if agent.budget_cost is None else str(Decimal(str(agent.budget_cost)) - total.cost),
            "operators": {name: {"calls": calls[name], **amount.to_json()} for name, amount in sorted(spent.items())}}


def archived_row(entry: EntrySummary) -> dict[str, Any]:
    s = entry.score
    return {"id": entry.id, "name": entry.name, "parents": list(entry.parents), "proposer": entry.proposer, "stage": Stage.ARCHIVED,
            "outcome": entry.outcome, "cause": entry.cause, "overall": s.overall if s else None, "ci": list(s.ci) if s and s.ci else None,
            "delta": s.delta if s else None, "delta_ci": list(s.delta_ci) if s and s.delta_ci else None, "verdict": _word(entry),
            "seeds": len(s.by_seed) if s else 0, "screened": entry.screened.to_json() if entry.screened else None}


def _word(entry: EntrySummary) -> str:
    """The baseline is compared with nothing, whatever its reflection is filed under."""
    return "baseline" if entry.id == BASELINE_ID and entry.score else entry.verdict


def active_row(candidate: Candidate) -> dict[str, Any]:
    proposal = candidate.proposal()
    return {"id": candidate.id, "name": proposal.name, "parents": list(proposal.parents), "proposer": proposal.proposer,
            "stage": candidate.stage, "outcome": candidate.outcome, "cause": candidate.cause, "overall": None, "ci": None,
            "delta": None, "delta_ci": None, "verdict": "", "seeds": 0, "screened": None,
            "attempts": [{"name": a.name, "outcome": a.outcome, "cause": a.result["cause"] if a.result else ""} for a in candidate.attempts]}


def running(candidate: Candidate, now: float) -> list[dict[str, Any]]:
    """Jobs in flight with their progress and the time they still need."""
    rows = []
    for attempt in candidate.attempts:
        if attempt.result is None:
            claim = latest_claim(attempt.folder)  # of a requeued job its present start: the wait before is no run time
            progress = eta.read_progress(attempt.folder)
            step, total = progress.get("step", 0), progress.get("total", 0)
            elapsed, left = now - claim["time"] if claim else 0.0, eta.job_left(progress)
            rows.append({"candidate": candidate.id, "attempt": attempt.name, "state": "running" if claim else "queued",
                         "stage": progress.get("stage", ""), "step": step, "total": total, "elapsed_s": round(elapsed, 1),
                         "eta_s": None if left is None else round(left, 1), "figures": progress.get("figures", {})})
    return rows


def leaderboard(campaign: Campaign, archive: ArchiveView | None = None) -> dict[str, Any]:
    """Archived candidates by score, with intervals and the paired difference to the baseline."""
    archive = archive or ArchiveView.load(campaign.root)
    entries = sorted(archive.entries,
                     key=lambda e: (e.score is None, e.screened is None, -(e.score.overall if e.score else 0), e.id))
    base = next((e.score for e in entries if e.id == BASELINE_ID), None)
    return {"campaign": str(campaign.root), "records": str(campaign.records), "score": campaign.config.evaluate.score,
            "start": base.curve.get(START) if base else None, "problems": _problems(archive),
            "rows": [{"rank": i + 1, **archived_row(e), "final": e.score.final if e.score else None,
                      "benchmarks": e.score.benchmarks if e.score else {}} for i, e in enumerate(entries)]}


def _problems(archive: ArchiveView) -> list[str]:
    return [f"{id}: {text}" for id, text in archive.problems.items()]


def show(campaign: Campaign, id: str) -> dict[str, Any]:
    folder = campaign.candidates / id
    entry = next((e for e in ArchiveView.load(campaign.root).entries if e.id == id), None)
    if entry is not None and not folder.is_dir():
        return shown_record(campaign, entry)
    candidate = campaign.load(id)
    if entry is not None:
        row, stage = archived_row(entry), Stage.ARCHIVED
    else:
        row, stage = active_row(candidate), candidate.stage
    return {**row, "stage": stage, "proposal": files.read_json(folder / "proposal.json"), "pick": files.read_json(folder / "pick.json"),
            "reflection": files.read_json(folder / "reflection.json"), "message": candidate.message, "folder": str(folder),
            "record": str(campaign.records / f"{id}.h5") if entry else None,
            "score": vars(entry.score) if entry and entry.score else None,
            "attempts": [{"name": a.name, "outcome": a.outcome, "cause": a.result["cause"] if a.result else None,
                          "run_seconds": a.result.get("run_seconds") if a.result else None} for a in candidate.attempts]}


def shown_record(campaign: Campaign, summary: EntrySummary) -> dict[str, Any]:
    """`show` of a candidate whose folder is gone."""
    path = campaign.records / f"{summary.id}.h5"
    entry = read(path)
    unit = lambda a: "" if a["seed"] is None else a.get("unit") or f"s{a['seed']}"  # noqa: E731 (earlier versions recorded no unit)
    named = [(jobspec.attempt_name(a["stage"], unit(a), a["number"]), a) for a in entry.attempts]
    return {**archived_row(summary), "proposal": entry.proposal, "pick": entry.pick, "reflection": entry.reflection, "message": entry.message,
            "folder": None, "record": str(path), "score": entry.score,
            "attempts": [{"name": name, "outcome": a["outcome"], "cause": a["cause"], "run_seconds": a["run_seconds"]} for name, a in named]}


# --- text

def table(rows: list[list[str]], head: list[str]) -> str:
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows])


def verdict(row: dict[str, Any]) -> str:
    """Of a leaderboard's row, for people: the reflection's word, and what it does not look at."""
    if row["id"] != BASELINE_ID and row["outcome"] != Outcome.SUCCEEDED:
        return f"failed: {row['cause']}"
    return wording.verdict(row["id"], row["delta"], row["delta_ci"], row["verdict"]) or "-"


def interval(value: float | None, ci: Any, sign: bool = False) -> str:
    """Points; `sign`: a difference. A score lies within 0..100, so its interval is cut there: it covers no less."""
    if ci and not sign:
        ci = max(ci[0], 0.0), min(ci[1], 100.0)
    if value is None:
        return "-"
    text = f"{value:+z.1f}" if sign else f"{value:z.1f}"  # z: no -0.0
    return text + (f" [{ci[0]:z.1f}, {ci[1]:z.1f}]" if ci else "")


def status_text(data: dict[str, Any]) -> str:
    b = data["budget"]
    short = b["proposed"] < b["candidates"]  # a drain or a budget left some out
    state = f"{'ended early' if short else 'done'}: {data['proposing_ended']}" if data["done"] else "held: " + ", ".join(data["held"]) if data["held"] else \
        f"held: the agent: {data['agent_blocked']}" if data["agent_blocked"] else "in progress" if data["driver"] else "not finished"
    limit = f" of {b['run_hours_limit']:g}" if b["run_hours_limit"] else ""
    left = f", about {b['run_hours_left']:.2g} to come" if b["run_hours_left"] else ""
    screened = f", {b['screened_out']} screened out" if b["screened_out"] else ""
    lines = [f"{data['campaign']}: {state}", f"candidates {b['proposed']}/{b['candidates']} proposed, {b['archived']} archived (with the baseline)"
             f"{screened}; {b['run_hours']:.2f}{limit} run hours{left}; {b['wall_clock_min']:.0f} min since creation{eta_text(b)}"]
    if data["driver"] or not data["done"]:
        lines.insert(1, driver_text(data))
    if data["proposing_ended"] and not data["done"]:
        lines.append(f"nothing new is proposed: {data['proposing_ended']}")
    if data["inbox"]:
        lines.append(f"packages in the inbox: {', '.join(data['inbox'])}; `poise-hpc run {shlex.quote(data['campaign'])}` takes them up")
    if llm := data.get("llm"):
        left = [f"{llm['cost_left']} left" if llm["cost_left"] is not None else "", f"{llm['tokens_left']} tokens left"
                if llm["tokens_left"] is not None else ""]
        lines.append("; ".join(filter(None, [f"language model: {llm['calls']} calls, {llm['tokens']} tokens, cost {llm['cost']}", *left])))
    lines += [f"problem: {p}" for p in data["problems"]]
    live = [r for r in data["candidates"] if r["stage"] != Stage.ARCHIVED]
    if live:
        waits = {a["candidate"]: f"{a['operator']} {'waits' if a['error'] else 'asked'}" for a in data["asked"]}
        lines.append(table([[r["id"], r["name"], ",".join(r["parents"]) or "-", r["stage"], r["cause"] or waits.get(r["id"], "-")] for r in live],
                           ["id", "name", "parents", "stage", "cause"]))
    lines += at_work_texts(data)
    return "\n".join(lines)


def eta_text(budget: dict[str, Any]) -> str:
    return f"; campaign ETA {budget['eta_s'] / 60:.1f} min" if budget["eta_s"] else ""


def driver_text(data: dict[str, Any]) -> str:
    """Who is at work on it; else how it goes on, and who went without a word."""
    if at := data["driver"]:
        return f"driven by process {at['pid']} on {at['host']} (lock refreshed {at['refreshed_s']:.0f} s ago)"
    lost = data["driver_lost"]
    gone = f" (process {lost['pid']} on {lost['host']} is gone; lock refreshed {lost['refreshed_s']:.0f} s ago)" if lost else ""
    return f"nobody drives it{gone}: `poise-hpc run {shlex.quote(data['campaign'])}` goes on"


def at_work_texts(data: dict[str, Any]) -> list[str]:
    """Jobs in flight, and what the language model is asked for."""
    return [progress_text(r) for r in data["running"]] + [
        f"{a['candidate']}  {a['operator']}  " + (f"waits: {wording.short(a['error'])}" if a["error"] else f"asked {a['model']}") for a in data["asked"]]


def progress_text(r: dict[str, Any]) -> str:
    if r["state"] == "queued":
        return f"{r['candidate']}  {r['attempt']}  queued"
    left = f"  ETA {r['eta_s']:.0f} s" if r["eta_s"] is not None else ""
    at = f"{r['stage']} {r['step']}/{r['total']}" if r["total"] else "starts"
    return f"{r['candidate']}  {r['attempt']}  {at}  {r['elapsed_s']:.0f} s{left}"


def leaderboard_text(data: dict[str, Any]) -> str:
    problems = [f"problem: {p}" for p in data["problems"]]
    if not data["rows"]:
        return "\n".join([f"nothing is archived yet; `poise-hpc status {shlex.quote(data['campaign'])}` says where it is", *problems])
    if data.get("kind") == "rerun":  # its one row is the entry, no baseline
        rows = [[f"{data['origin']['id']} again", r["name"], interval(r["overall"], r["ci"]), str(r["seeds"])] for r in data["rows"]]
        return f"{table(rows, ['entry', 'name', overall_head(data), 'seeds'])}\narchive: {data['records']}"
    rows = [[str(r["rank"]), r["id"], r["name"], ",".join(r["parents"]) or "-", interval(r["overall"], r["ci"]),
             "baseline" if r["id"] == BASELINE_ID else interval(r["delta"], r["delta_ci"], sign=True), str(r["seeds"]), ending(r)] for r in data["rows"]]
    text = table(rows, ["rank", "id", "name", "parents", overall_head(data), f"against {BASELINE_ID}", "seeds", "verdict"])
    start = f"untrained policy {data['start']:.1f}. " if data["start"] is not None else ""
    return "\n".join([
        f"{text}\n{start}[a, b]: 95 % intervals over training seeds, paired with {BASELINE_ID} in the difference; a score's is cut to 0..100.",
        *problems, f"archive: {data['records']}"])


def overall_head(data: dict[str, Any]) -> str:
    return f"overall ({data['score']})"


def ending(row: dict[str, Any]) -> str:
    """Of a leaderboard's row: the verdict, or why there is none."""
    if s := row["screened"]:
        return f"screened out at {screening.percent(s['at'])}: {interval(s['delta'], s['delta_ci'], sign=True)} there"
    return verdict(row)


def show_text(data: dict[str, Any]) -> str:
    p = data["proposal"]
    lines = [f"{data['id']}  {data['name']}  {data['stage']}" + (f"  {data['cause']}: {data['message']}" if data["cause"] else ""),
             f"parents      {', '.join(data['parents']) or 'none'}   proposer {data['proposer']}",
             f"mechanisms   {', '.join(p['mechanisms']) or 'none declared'}", f"hypothesis   {p['hypothesis'] or 'none stated'}",
             f"change       {p['description'] or 'none stated'}", f"expected     {p['expected_effect'] or 'none stated'}"]
    if data["pick"]:
        lines.append(f"why {data['pick']['parent']}    {data['pick']['explanation']}")
    if data["score"]:
        s = data["score"]
        lines.append(f"overall      {interval(s['overall'], s['ci'])}   final {s['final']:.1f}   against {BASELINE_ID} "
                     f"{interval(s['delta'], s['delta_ci'], sign=True)}")
        lines.append("benchmarks   " + "  ".join(f"{k} {v:.1f}" for k, v in s["benchmarks"].items()))
    if data["reflection"]:
        r = data["reflection"]
        hypothesis = f"; its hypothesis {r['hypothesis']}" if r.get("hypothesis") else ""
        said = wording.verdict(data["id"], data["delta"], data["delta_ci"], r["verdict"])
        lines += ([f"verdict      {said}{hypothesis} (by {r['author']})"] if said else []) + [wording.plain(wording.without_verdict(r))]
    lines += [f"attempt      {a['name']}  {a['outcome'] or 'in flight'}  {a['cause'] or ''}".rstrip() for a in data["attempts"]]
    lines += [f"{what:<12} {data[what]}" for what in ("folder", "record") if data[what]]
    return "\n".join(lines)


def logs(campaign: Campaign, id: str, lines: int) -> dict[str, Any]:
    """The end of each attempt's logs; of an attempt whose worker never started, the launcher's."""
    folder = campaign.root / id if id == "prepare" else campaign.load(id).folder
    rows = []
    for attempt in load_attempts(folder):
        found = sorted(attempt.folder.glob("log*.out")) or sorted(attempt.folder.glob("submitit/*_log.out"))
        rows.append({"attempt": attempt.name, "outcome": attempt.outcome, "cause": attempt.result["cause"] if attempt.result else "",
                     "message": attempt.result["message"] if attempt.result else "",
                     "logs": {path.name: path.read_text(errors="replace").splitlines()[-lines:] for path in found}})
    return {"candidate": id, "attempts": rows}


def logs_text(data: dict[str, Any]) -> str:
    parts = []
    for a in data["attempts"]:
        parts.append(f"== {a['attempt']}: {a['outcome'] or 'in flight'}" + (f"  {a['cause']}: {a['message']}" if a["cause"] else ""))
        parts += [line for log in a["logs"].values() for line in log] or ["the log is empty" if a["logs"] else "there is no log"]
    return "\n".join(parts) or f"{data['candidate']} has no attempts yet"
