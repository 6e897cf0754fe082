"""The command line: quick to start, and honest in its exit code (0 done, 1 failed, 2 bad usage)."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Sequence

from cyclopts import App

from overproof.cli.comparing import compare
from overproof.cli.evolving import evolve
from overproof.cli.explaining import explain
from overproof.cli.generating import generate
from overproof.cli.grouping import groups
from overproof.cli.guarding import guard, predict
from overproof.cli.looking import evaluate, report
from overproof.cli.recipes import demo, reproduce, run
from overproof.cli.telling import list_entries, show_one
from overproof.cli.training import distill, probe_linear, resume, train
from overproof.errors import OverproofError, UsageError

app = App(
    name="overproof", help="Distil image classifiers that are small, accurate and hard to fool.", version_flags=["--version"]
)
for _command in (train, distill, probe_linear, resume, evaluate, compare, report, run, demo, reproduce, explain):
    app.command(_command)
app.command(evolve)
app.command(generate)
app.command(predict)
app.command(groups)
app.command(guard)
app.command(list_entries, name="list")
app.command(show_one, name="show")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit."""
    # A scheduler's SIGTERM is a Ctrl-C: what is under way is recorded as interrupted, and training writes a checkpoint first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(call(list(sys.argv[1:] if arguments is None else arguments)))


def call(arguments: list[str]) -> int:
    """Run one command; returns the exit code."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except KeyboardInterrupt:
        return _fail("Stopped.", 1, debug)
    except UsageError as error:
        return _fail(str(error), 2, debug)
    except OverproofError as error:
        return _fail(str(error), 1, debug)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if type(error).__module__.startswith("cyclopts"):
            return _fail(str(error), 2, debug)
        return _fail(f"{type(error).__name__}: {error} (--debug shows where.)", 1, debug)
    return 0


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"overproof: {message}", file=sys.stderr)
    return code
