"""`onnxprune prune`: one cut by weights, no data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from onnxprune.api import PruneResult, prune
from onnxprune.cli.options import KEEP_OPTION, KINDS_OPTION, LAYERS_OPTION, PROTECT_OPTION, ROUND_TO, with_json
from onnxprune.cli.output import PlainTable, print_json, say, show
from onnxprune.cli.tables import share
from onnxprune.scoring.score import CRITERIA, SCOPES


@click.command("prune")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The pruned model.")
@click.option(
    "--ratio", type=float, required=True, help="Share of each group's units to remove (of all, with --scope global)."
)
@click.option("--criterion", type=click.Choice(list(CRITERIA)), default="l2", help="How units are scored.")
@click.option("--scope", type=click.Choice(SCOPES), default="layer", help="What units are compared with.")
@click.option("--round-to", type=ROUND_TO, default="1", metavar="N|auto", help="Widths are rounded up to a multiple.")
@click.option(
    "--granularity",
    type=click.Choice(["auto", "rows", "columns"]),
    default="auto",
    help="Heads and groups: whole (rows) or thinner (columns).",
)
@KINDS_OPTION
@PROTECT_OPTION
@KEEP_OPTION
@LAYERS_OPTION
@click.option("--seed", type=int, default=0, help="For --criterion random.")
@click.option("--plan", type=click.Path(path_type=Path), help="Write what was removed as JSON.")
@click.option(
    "--baseline", type=click.Path(path_type=Path), help="Write the normalised model whose names the plan uses."
)
@with_json
def prune_command(model: Path, as_json: bool, **given: Any) -> int:
    """Removes the least important units of MODEL, judged by its weights alone."""
    result = prune(model, **given)
    if as_json:
        print_json(result.to_json())
        return 0
    show_result(result)
    return 0


def show_result(result: PruneResult) -> None:
    """What one cut did, and how it was checked."""
    show(costs_table(result))
    checked = "equal to the masked model" if result.compared else f"not comparable with the masked model: {result.why}"
    if result.compared and not result.plan.exact:
        checked += f" with the means of {len(result.plan.inexact_nodes)} nodes taken over what is left"
    say(f"written: {result.output} (runs in onnxruntime; {checked}; not fine-tuned: accuracy was not measured)")


def costs_table(result: PruneResult) -> Table:
    """MACs and parameters before and after one cut."""
    table = PlainTable("before and after")
    for name in ("", "before", "after", "left"):
        table.add_column(name, justify="left" if not name else "right")
    table.add_row("MACs", *(f"{n:,}" for n in result.macs), share(*result.macs))
    table.add_row("parameters", *(f"{n:,}" for n in result.params), share(*result.params))
    return table
