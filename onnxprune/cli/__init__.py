"""The command line: one file for each command, and one place that turns errors into messages and exit statuses."""

from __future__ import annotations

import os
import sys
import traceback

import click

import onnxprune
from onnxprune.cli.apply import apply_command
from onnxprune.cli.bench import bench_command
from onnxprune.cli.doctor import doctor_command
from onnxprune.cli.export import export_command
from onnxprune.cli.inspect import inspect_command
from onnxprune.cli.output import print_json, prints_elsewhere, say
from onnxprune.cli.probe import probe_command
from onnxprune.cli.prune import prune_command
from onnxprune.cli.run import run_command
from onnxprune.cli.sensitivity import sensitivity_command
from onnxprune.cli.verify import verify_command
from onnxprune.errors import OnnxPruneError

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(onnxprune.__version__, prog_name="onnxprune")
def cli() -> None:
    """Makes trained ONNX models smaller and faster: prunes channels, heads and units, repairs and fine-tunes the rest.

    Exit status: 0 done; 2 usage; 3 the model can't be used; 4 the data can't be used; 5 no plan meets the targets;
    6 training failed or isn't available; 7 the result is of no use and wasn't written; verify: 8 different, 9 not
    comparable; 130 interrupted.
    """


for command in (
    run_command,
    prune_command,
    inspect_command,
    sensitivity_command,
    apply_command,
    verify_command,
    bench_command,
    probe_command,
    export_command,
    doctor_command,
):
    command.callback = prints_elsewhere()(command.callback)  # type: ignore[type-var]
    cli.add_command(command)


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
