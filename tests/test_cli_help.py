"""What a newcomer reads: every command is listed, whole, with --json; documents name only commands and options that exist."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from poise_hpc import cli

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "archive_store" / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "slurm").glob("*.md"))]
SUBMITTING = {"run", "step", "rerun", "confirm", "ablate", "control", "transfer", "replay"}  # doctor has --no-job


def leaves(group=cli.main, path=()):
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(leaves())


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_json_and_every_option_says_what_it_does(path):
    options = {o.name: o for o in COMMANDS[path].params if isinstance(o, click.Option)}
    assert "as_json" in options
    assert all(o.help for o in options.values()), [name for name, o in options.items() if not o.help]


def test_what_submits_has_a_dry_run():
    assert {path[-1] for path, c in COMMANDS.items() if any(o.name == "dry_run" for o in c.params)} == SUBMITTING


@pytest.mark.parametrize("group", [(), ("archive",), ("data",)])
def test_the_list_of_commands_is_whole(group):
    shown = CliRunner().invoke(cli.main, [*group, "--help"], terminal_width=80).output
    owner = cli.main
    for name in group:
        owner = owner.commands[name]
    assert "..." not in shown.partition("\n\n")[2] and max(map(len, shown.splitlines())) <= 80
    for name, command in owner.commands.items():
        first = command.help.strip().split(".")[0].replace("\n", " ")
        assert re.search(rf"^  {name} +{re.escape(first[:40])}", shown, re.MULTILINE), (name, first)


def test_the_first_screen_says_what_to_type_first():
    lines = CliRunner().invoke(cli.main, []).output.splitlines()[:12]
    assert any(line.strip().startswith("poise-hpc run ") for line in lines)
    assert [line.split("--config ")[1] for line in lines if "--config" in line] == ["configs/demo.yaml"]


def test_the_number_of_seeds_is_told():
    from poise_hpc import derived

    for name in ("confirm", "transfer"):
        assert f"[{derived.SEEDS}, fresh]" in " ".join(CliRunner().invoke(cli.main, [name, "--help"]).output.split())
    assert "[as many as the entry has]" in " ".join(CliRunner().invoke(cli.main, ["ablate", "--help"]).output.split())


# --- documents

def written(text):
    """Every `poise-hpc ...` in code: lines of blocks, joined where they end in a backslash, and inline code."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()] + re.findall(r"`([^`]+)`", prose)
    for line in lines:
        if match := re.search(r"(?:^|[\s/;])poise-hpc\s+(.*)", line.partition(" #")[0]):
            yield re.split(r"\s*(?:;|&&|\|\s|>|\)$)", match[1])[0].strip()


def fault(line):
    """What is wrong with it, "" if nothing: a command that does not exist, or an option that it has not."""
    command, words = cli.main, shlex.split(line)
    while isinstance(command, click.Group) and words:
        if words[0].startswith("-") or words[0] in ("COMMAND", "..."):
            return ""
        name = words.pop(0)
        if name not in command.commands:
            return f"no command {name!r}"
        command = command.commands[name]
    known = {text for p in command.params if isinstance(p, click.Option) for text in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    unknown = [w for w in words if w.startswith("--") and w.partition("=")[0].strip("[]") not in known]
    return f"no option {', '.join(unknown)}" if unknown else ""


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_documents_name_only_what_exists(path):
    faults = {line: said for line in written(path.read_text()) if (said := fault(line))}
    assert not faults


def anchors(text):
    """As GitHub makes them of headings."""
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere_and_no_table_is_torn(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, place = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists() and (not place or place in anchors(target.read_text())), link
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # a blank line in it makes two, of which the second has no head
        assert re.search(r"\A.*\n\|[-|: ]+\|\n", table), table.splitlines()[0]


def test_the_documents_are_read_at_all():
    lines = list(written((ROOT / "README.md").read_text()))
    assert len(lines) >= 8 and fault("leaderbord x") == "no command 'leaderbord'" and fault("run x --nodes 3") == "no option --nodes"
