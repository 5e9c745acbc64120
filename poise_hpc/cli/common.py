"""What all commands share: errors as one line and an exit code, `--json`, argument types."""
from __future__ import annotations

import errno
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .. import files
from ..types import PoiseError, UsageError

HELD = 3
FOLDER = click.Path(file_okay=False, path_type=Path)                        # may be new
PACKAGE = click.Path(exists=True, readable=True, path_type=Path)            # a folder, or one .py file
FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


class CandidateId(click.ParamType):
    """c0003; what is meant by `3` or `c3` is said, not guessed: candidates are stopped and vetoed by it."""

    name = "candidate"

    def __init__(self, *others: str):
        self.others = others  # words that stand beside the ids

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if re.fullmatch(r"c\d{4,}", value) or value in self.others:
            return value
        number = re.fullmatch(r"[cC]?0*(\d+)", value)
        self.fail(f"{value!r} is no candidate; " + (f"did you mean c{int(number[1]):04d}?" if number else
                  "c0003 would be one, and `poise-hpc status CAMPAIGN` lists them"), param, ctx)


CANDIDATE = CandidateId()


class Group(click.Group):
    """Lists its commands by topic, whole sentences. Turns our errors into one line and an exit code; a traceback is a bug."""

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        self.topics: dict[str, tuple[click.Command, ...]] = {}

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except BrokenPipeError:  # `| head`: click's own affair
            raise
        except (PoiseError, OSError) as error:
            click.echo(f"error: {explained(error)}", err=True)
            sys.exit(1)

    def under(self, topic: str, *commands: click.Command) -> None:
        self.topics[topic] = commands
        for command in commands:
            self.add_command(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(len(name) for name in self.commands)
        for topic, commands in self.topics.items():
            with formatter.section(topic):
                formatter.write_dl([(str(c.name).ljust(width), c.get_short_help_str(200)) for c in commands])


def explained(error: Exception) -> str:
    """What the system says of a full or read-only disk, with the way out."""
    if isinstance(error, OSError) and error.filename is not None and (files.full(error) or error.errno == errno.EROFS):
        cure = "Make room there" if files.full(error) else "Make that place writable"
        return f"{error.strerror}: {error.filename} cannot be written. {cure} and give the same command again: nothing is lost"
    return str(error)


campaign_argument = click.argument("campaign", type=FOLDER)
site_option = click.option("--site", "site_file", type=FILE, help="Site file: where jobs run. The campaign keeps it; without any, jobs run on this host.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would be submitted, and submit nothing.")


def as_json(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print machine-readable JSON.")(command)


def emit(data: Any, as_json: bool, text: Callable[[Any], str]) -> None:
    click.echo(json.dumps(data, indent=2, default=str) if as_json else text(data))
