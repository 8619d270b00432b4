"""`onnxprune doctor`: what this environment can do."""

from __future__ import annotations

from pathlib import Path

import click
import onnxruntime

from onnxprune.cli.options import with_json
from onnxprune.cli.output import PlainTable, print_json, say, show
from onnxprune.graph.model import is_loadable
from onnxprune.running.report import versions
from onnxprune.training import find_runtime, install_runtime, supported


@click.command("doctor")
@click.option(
    "--install-training", is_flag=False, flag_value="", metavar="[WHEEL]",
    help="Install the training runtime now, from a wheel file or through pip.",
)  # fmt: skip
@with_json
def doctor_command(install_training: str | None, as_json: bool) -> int:
    """Shows versions, execution providers, and whether fine-tuning works here."""
    if install_training is not None:
        install_runtime(Path(install_training) if install_training else None, say)
    runtime = find_runtime()
    state = (
        str(runtime)
        if runtime
        else "not installed yet: comes when first needed"
        if supported()
        else "no wheel for this platform"
    )
    providers = {name: is_loadable(name) for name in onnxruntime.get_available_providers()}
    found = {
        "versions": versions(),
        "execution_providers": [name for name, loads in providers.items() if loads],
        "unloadable_providers": [name for name, loads in providers.items() if not loads],
        "training_runtime": {"supported": supported(), "installed": runtime is not None, "state": state},
    }
    if as_json:
        print_json(found)
        return 0
    table = PlainTable("onnxprune doctor")
    table.show_header = False
    for name, version in versions().items():
        table.add_row(name, version)
    said = [name if loads else f"{name} (can't be loaded here)" for name, loads in providers.items()]
    table.add_row("execution providers", ", ".join(said))
    table.add_row("training runtime", state)
    show(table)
    return 0
