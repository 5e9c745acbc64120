"""What `poise-hpc plan` prints: the answer first, then where it comes from."""
from __future__ import annotations

from typing import Any

from .. import wording
from . import memory
from .devices import GIB
from .plan import refusal


def text(data: dict[str, Any]) -> str:
    m, model = data["memory"], data["model"]
    answer, *ways = verdict(m).splitlines()
    lines = [f"{answer}; {hours_text(data['cost'])}", "", f"{model['architecture']}: {model['parameters'] / 1e6:,.1f} M parameters, {model['layers']} layers; {data['ranks']} rank(s), each on {data['device']['name']}", ""]
    shown = [line for line in m["lines"] if round(line["bytes"] / GIB, 3)]
    width = max(len(line["name"]) for line in shown)
    lines.append(f"{'GiB a rank':>10}  {'':{width}}  {'  '.join(memory.PHASES)}")
    for line in shown:
        marks = "  ".join(("x" if p in line["phases"] else ".").center(len(p)) for p in memory.PHASES)
        lines.append(f"{line['bytes'] / GIB:10.3f}  {line['name']:{width}}  {marks}  {line['arithmetic']}")
    lines.append(f"{m['peak'] / GIB:10.3f}  {'at most: ' + m['worst']:{width}}  "
                 + "  ".join(f"{m['phases'][p] / GIB:.2f}".center(len(p)) for p in memory.PHASES))
    lines += ["", *([*ways, ""] if ways else []), *cost_text(data["cost"])]
    return "\n".join([*lines, *(f"assumed: {a}" for a in data["assumed"])])


def verdict(data: dict[str, Any]) -> str:
    if data["fits"] is None:
        return "whether it fits is unknown: the site file says neither gpus.memory_gb nor gpus.device"
    return f"it fits into {data['limit_gb']:g} GiB" + (", tightly" if data["tight"] else "") if data["fits"] else refusal(data)


def hours_text(c: dict[str, Any]) -> str:
    """What is to come, as far as that is known."""
    low, high = c["left_hours"] / c["spread"], c["left_hours"] * c["spread"]
    return (f"{c['left']} candidates to come take about {c['left_hours']:.2g} {c['unit']}, 90 % within {low:.2g} to {high:.2g}: "
            f"{wording.duration(3600 * c['left_wall_hours'])} with {wording.count(c['slots'], 'job')} side by side, queues not counted")


def cost_text(c: dict[str, Any]) -> list[str]:
    lines = ["one training run    predicted s   measured s   correction (runs)"]
    for part, x in c["seconds"].items():
        known = "-" if x["measured"] is None else f"{x['measured']:.1f}"
        lines.append(f"  {part:16} {x['predicted']:12.1f} {known:>12}   x {x['factor']:.2f}, 90 % within x/ {x['spread']:.1f} ({x['runs']})")
    if c["error"]:
        e = c["error"]
        lines.append(f"predictions made before each of {e['runs']} runs were off by a factor of {e['predicted_factor']:.2f}; uncorrected {e['assumed_factor']:.2f}")
    lines += [f"a candidate: {c['candidate_hours']:.3g} {c['unit']}; {c['candidates']} candidates with the baseline: {c['campaign_hours']:.3g}"]
    if c["rung_hours"]:
        lines.append("with screening that is the most; a candidate that goes no further than a rung has used "
                     + ", ".join(f"{hours:.3g}" for hours in c["rung_hours"]) + f" {c['unit']}")
    return [*lines, *(f"warning: {w}" for w in c["over_limit"])]
