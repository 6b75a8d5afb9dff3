"""The command line: argv to one function call each, and what a person sees of it.

Owns argument parsing, printing, progress bars and exit codes. Whatever is heavy is imported by the command that needs it, so that
`nas --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import threading
import traceback

import click

from ..errors import RunFailed, UserError
from .check import check
from .kept import data, list_runs, remove, watch
from .models import convert, evaluate, export, train
from .searching import compare, dashboard, extend, front, new, report, resume, search, sync, ui
from .sharing import describe, diff, zoo

RENAMED = {
    "truth": "python -m reports.ground_truth",
    "rank": "python -m reports.ranking",
    "samplers": "python -m reports.samplers",
    "contest": "python -m reports.contest",
}
"""Commands of version 0.1 that are called otherwise now."""


class _InOrder(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in RENAMED:
            raise click.UsageError(f"`nas {name}` is now `{RENAMED[name]}`, in a checkout of this package")
        return super().get_command(ctx, name)


def _say_version(ctx: click.Context, option: click.Parameter, asked: bool) -> None:
    from importlib.metadata import PackageNotFoundError, version

    if asked:
        try:
            click.echo(f"nas, version {version('nas-sharing')}")
        except PackageNotFoundError:
            click.echo("nas, of a checkout that is not installed")
        ctx.exit()


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_say_version, help="Show the version and exit."
)
def nas() -> None:
    """Search how a transformer language model should share its parameters and its KV cache.

    A search leaves a front of memory against perplexity; any point of it leaves as a Hugging Face model folder.
    """


ROAD = (
    *(new, search, resume, extend, watch, list_runs, remove, front, ui, dashboard, sync, export, convert, train, evaluate, zoo),
    *(compare, describe, diff, check, report, data),
)
for command in ROAD:
    nas.add_command(command)


def main(command: click.Command = nas) -> None:
    """The entry point. A user's mistake, a full disk or a signal is one line and an exit code, never a traceback.

    Exit codes: 2 for a mistake of the user's, 1 for a run that failed, 130 after Ctrl-C, 143 after SIGTERM.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        command.main(standalone_mode=False)
    except UserError as error:
        _end(f"error: {error}", 2)
    except RunFailed as error:
        _end(f"error: {error}", 1)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.UsageError as error:
        _end(f"error: {error.format_message()} (see `{error.ctx.command_path if error.ctx else 'nas'} --help`)", 2)
    except click.Abort:
        _end(f"terminated; {GO_ON}" if _TERMINATED.is_set() else f"interrupted; {GO_ON}", 143 if _TERMINATED.is_set() else 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(f"error: {where}{error.strerror or error}", 1 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2)
    except Exception as error:
        with tempfile.NamedTemporaryFile("w", prefix="nas-error-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        _end(f"error: a defect of this program: {what}; please report it with {file.name}", 1)


GO_ON = "a search continues with `nas resume RUN`, a comparison with the same command"


_TERMINATED = threading.Event()  # SIGTERM came


def _terminate(number: int, frame: object) -> None:
    _TERMINATED.set()
    raise KeyboardInterrupt  # the one exception of a signal's handler that passes Ray's waiting as it is


LONGEST = 300  # characters of an error's line: of a longer one the beginning and the end are shown


def _end(message: str, code: int) -> None:
    line = " ".join(message.encode(errors="backslashreplace").decode().split())  # names of files may be no text
    click.echo(line if len(line) <= LONGEST else f"{line[:180]} … {line[3 - LONGEST + 180 :]}", err=True)
    sys.exit(code)
