"""The command line: one file for each command, and one place that turns errors into messages and exit statuses."""

from __future__ import annotations

import importlib
import os
import sys
import traceback

import click

import onnxprune
from onnxprune.cli.output import print_json, prints_elsewhere, say
from onnxprune.errors import OnnxPruneError

COMMANDS = {  # each in the module of its name, which is loaded when it is called
    "run": "Prune, repair, fine-tune, check and benchmark.",
    "prune": "One cut by weights, without data.",
    "inspect": "What can be pruned, and why the rest can't.",
    "sensitivity": "How much each group matters, measured.",
    "apply": "Repeat a plan on a model of the same architecture.",
    "verify": "Compare a pruned model with its masked baseline.",
    "bench": "Time models against each other.",
    "probe": "Measure what widths cost on this machine.",
    "export": "Smaller numbers, or the .ort format.",
    "doctor": "What this environment can do.",
}
INTERRUPTED = 130


class Commands(click.Group):
    """Commands that are loaded when they are called: most of the time that a start takes is theirs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, the most needed first."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"onnxprune.cli.{cmd_name}"), f"{cmd_name}_command")
        if command.name not in self.commands:
            command.callback = prints_elsewhere()(command.callback)  # type: ignore[type-var]
            self.add_command(command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """What each does, without loading it."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(onnxprune.__version__, prog_name="onnxprune")
def cli() -> None:
    """Makes trained ONNX models smaller and faster: prunes channels, heads and units, repairs and fine-tunes the rest.

    Exit status: 0 done; 2 usage; 3 the model can't be used; 4 the data can't be used; 5 no plan meets the targets;
    6 training failed or isn't available; 7 the result is of no use and wasn't written; verify: 8 different, 9 not
    comparable; 130 interrupted.
    """


def main() -> None:
    """Runs a command and exits with its status. No traceback reaches the user."""
    sys.exit(call(sys.argv[1:]))


def call(arguments: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    try:
        return cli.main(arguments, prog_name="onnxprune", standalone_mode=False) or 0
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.ClickException as error:
        usage = error.ctx.get_usage() if isinstance(error, click.UsageError) and error.ctx is not None else None
        if usage is not None:
            say(usage)
        return _fail(arguments, error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as stop:
        said = str(stop.__cause__ or "") if isinstance(stop, click.Abort) else str(stop)
        return _fail(arguments, f"interrupted{': ' if said else ''}{said}", INTERRUPTED)
    except OnnxPruneError as error:
        return _fail(arguments, str(error), error.exit_status)
    except OSError as error:
        return _fail(arguments, f"{error.filename or 'the system'}: {error.strerror or error}", 2)
    except Exception as error:  # a fault of ours
        if os.environ.get("ONNXPRUNE_DEBUG"):
            traceback.print_exc()
        text = f"internal error: {type(error).__name__}: {error}; please report it (ONNXPRUNE_DEBUG=1 shows where)"
        return _fail(arguments, text, 1)


def _fail(arguments: list[str], message: str, status: int) -> int:
    say(message if status == INTERRUPTED else f"error: {message}")
    if "--json" in arguments:
        print_json({"error": message, "exit_status": status})
    return status
