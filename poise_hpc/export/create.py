"""The exported folder: an archive entry's algorithm as a plug-in for another trainer, with the proof that it computes the same.

Self-contained: nothing of poise_hpc is needed to use it. The vectors are made by a job (candidate code runs); this process only
reads and writes text. What a trainer cannot host is refused before anything is written; the folder appears whole or not at all.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml

from .. import __version__, archive, files, standalone
from ..campaign import Campaign
from ..types import Outcome, PoiseError, UsageError
from . import targets, vendor

TEMPLATES = Path(__file__).parent / "templates"
FORMAT = 1


def export(campaign: Campaign, id: str, target: str, folder: Path) -> dict[str, Any]:
    """An archived candidate's export; what is in it."""
    path = campaign.records / f"{id}.h5"
    if not path.exists():
        raise UsageError(f"{id} has no archive entry in {campaign.root}; `poise-hpc leaderboard {campaign.word}` lists those that have")
    entry = archive.read(path)
    if entry.score is None:
        raise UsageError(f"{id} has no score ({entry.cause}): there is nothing to export. `poise-hpc leaderboard {campaign.word}` lists those that have one")
    origin = {"campaign": campaign.root.name, "candidate": entry.id, "name": entry.name, "parents": list(entry.parents),
              "record_sha256": archive.identity(path), "created": entry.created, "trained_with": entry.versions,
              "score": {key: entry.score[key] for key in ("overall", "ci", "delta", "delta_ci") if key in entry.score}}
    return package(entry.code, target, folder, origin, yaml.safe_load(entry.config)["rollout"]["weight_cap"])


def package(code: Mapping[str, str], target: str, folder: Path, origin: dict[str, Any], weight_cap: float = 2.0) -> dict[str, Any]:
    """A package's export. `origin` says where it comes from; "name" names the plug-in."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already; give a new or an empty folder")
    if target == "openrlhf":
        raise UsageError(targets.OPENRLHF)
    with tempfile.TemporaryDirectory(prefix="poise-export-") as scratch:
        facts, versions, vectors = measure(code, Path(scratch), weight_cap)
    if reasons := targets.refusals(target, facts):
        raise UsageError(f"{origin['name']} cannot be exported to {target}:\n" + "\n".join(f"- {reason}" for reason in reasons))
    plugin = "poise_" + (re.sub(r"\W+", "_", origin["name"].lower(), flags=re.ASCII).strip("_") or "algorithm")
    texts = assembled(code, target, plugin, facts, origin, weight_cap)
    provenance = {"format": FORMAT, "target": {"name": target, "version": targets.TARGETS[target].version}, "plugin": plugin, "origin": origin,
                  "algorithm": facts, "weight_cap": weight_cap, "exported_with": {"poise_hpc": __version__, **versions},
                  "exported": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "code_sha256": {n: digest(t.encode()) for n, t in code.items()},
                  "vectors_sha256": digest(vectors)}
    content = {name: text.encode() for name, text in texts.items()}
    content |= {"vectors.npz": vectors, "provenance.json": (json.dumps(provenance, indent=2, ensure_ascii=False) + "\n").encode()}
    write(folder, content)
    return {"folder": str(folder), "plugin": plugin, "files": sorted(content), **provenance}


def measure(code: Mapping[str, str], scratch: Path, weight_cap: float) -> tuple[dict[str, Any], dict[str, str], bytes]:
    """(facts, versions, vectors) from the export job, isolated as any that runs candidate code."""
    folder, attempt = scratch / "package", scratch / "attempt"
    folder.mkdir()
    attempt.mkdir()
    for name, text in code.items():
        (folder / name).write_text(text, encoding="utf-8")
    result = standalone.alone("export", folder, attempt, weight_cap=weight_cap)
    if result["outcome"] != Outcome.SUCCEEDED:
        raise PoiseError(f"the algorithm's vectors could not be computed ({result['cause']}): {result['message']}")
    payload = result["payload"]
    return payload["facts"], payload["versions"], (attempt / "vectors.npz").read_bytes()


def assembled(code: Mapping[str, str], target: str, plugin: str, facts: dict[str, Any], origin: dict[str, Any],
              weight_cap: float) -> dict[str, str]:
    """Path -> text of everything but vectors and provenance."""
    reads = targets.reads(target, facts)
    words = {"plugin": plugin, "name": origin["name"], "install": targets.TARGETS[target].install, "test": targets.TARGETS[target].test, "version": targets.TARGETS[target].version,
             "reduction": facts["reduction"], "weight_cap": f"{weight_cap:g}", "poise": __version__,
             "source": f"{origin['candidate']} of campaign {origin['campaign']}" if "campaign" in origin else origin["name"],
             "reads": ", ".join(f"`{name}`" for name in reads) or "nothing beyond rewards, groups, masks and log-probs",
             "beta": "0.001" if "ref_logp" in facts["needs"] else "0.0"}
    texts = {f"{plugin}/{name}": text for name, text in vendor.plugin(code, target, reads).items()}
    for name in targets.TARGETS[target].files:
        texts[name] = Template((TEMPLATES / target / f"{name}.in").read_text(encoding="utf-8")).substitute(words)
    return texts | {"LICENSE": (TEMPLATES / "LICENSE").read_text(encoding="utf-8")}


def write(folder: Path, content: Mapping[str, bytes]) -> None:
    """All or nothing: a sibling folder that takes the name when it is whole."""
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, data in content.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            files.write_atomic(temporary / name, data)
        temporary.chmod(0o755)
        os.rename(temporary, folder)  # over an empty folder, too
    except BaseException:  # a full disk or Ctrl-C: nothing is left behind, and nothing is swallowed
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def text(data: dict[str, Any]) -> str:
    return (f"{data['origin']['name']} for {data['target']['name']} {data['target']['version']}: {len(data['files'])} files in {data['folder']}\n"
            f"`python -m pytest {data['folder']}/test_equivalence.py` shows that it computes the same there; README.md says how to use it.\n"
            f"The test needs {targets.TARGETS[data['target']['name']].test}")
