"""`onnxprune sensitivity`: how much each group matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from onnxprune.choosing.sensitivity import RATIOS, SAMPLES, Sensitivity, check_plot, plot, sensitivity
from onnxprune.cli.options import IMAGE_OPTIONS, image_options, options, with_json
from onnxprune.cli.output import PlainTable, TerminalListener, print_json, say, show
from onnxprune.errors import UsageError
from onnxprune.evaluating.metrics import NAMES
from onnxprune.graph.files import write_json
from onnxprune.graph.model import check_outputs
from onnxprune.scoring.score import CRITERIA


@click.command("sensitivity")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    multiple=True,
    help="Data to measure on: .npz, folder of images, or module:function; repeatable.",
)
@click.option(
    "--ratios", default=",".join(map(str, RATIOS)), metavar="F,F…", help="Shares of a group's units to remove."
)
@click.option("--criterion", type=click.Choice(list(CRITERIA)), default="l2", help="How units are scored.")
@click.option("--metric", metavar="NAME", help=", ".join(NAMES) + ".")
@click.option("--samples", type=int, default=SAMPLES, metavar="N", help="Samples to measure on.")
@click.option("--parallel", default="1", metavar="N|dask:HOST:PORT|ray:ADDRESS", help="Processes here, or a cluster.")
@click.option("--seed", type=int, default=0, metavar="N", help="For --criterion random.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write the curves as JSON.")
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="Draw the curves (.png, .svg).")
@options(IMAGE_OPTIONS)
@with_json
def sensitivity_command(model: Path, output: Path | None, picture: Path | None, as_json: bool, **given: Any) -> int:
    """Removes a share of each group of MODEL in turn, alone and unrepaired, and measures what that costs."""
    images = image_options(given)
    try:
        given["ratios"] = tuple(float(each) for each in given["ratios"].split(","))
    except ValueError as error:
        raise UsageError(f"--ratios takes numbers separated by commas: {error}") from error
    check_outputs(model, [output, picture], given["data"])
    if picture is not None:
        check_plot(picture)
    with TerminalListener() as listener:
        found = sensitivity(model, images=images, listener=listener, **given)
    if output is not None:
        write_json(output, found.to_json())
    if picture is not None:
        plot(found, picture)
    if as_json:
        print_json(found.to_json())
    else:
        show(curves_table(found))
        say(f"uncut: {found.metric} {found.uncut:.2f}, on {found.samples} samples")
    return 0


def curves_table(found: Sensitivity) -> Table:
    """What each group costs by ratio, the dearest first."""
    table = PlainTable(f"points of {found.metric} lost when a share of one group goes")
    for name in ("group", "kind"):
        table.add_column(name)
    ratios = found.curves[0].ratios if found.curves else ()
    for name in ("units", *(f"{100 * ratio:g} %" for ratio in ratios), "MACs saved"):
        table.add_column(name, justify="right")
    for curve in sorted(found.curves, key=lambda curve: -max(curve.drops)):
        drops = (f"{drop:.2f}" for drop in curve.drops)
        table.add_row(curve.group, curve.kind, str(curve.units), *drops, f"{100 * curve.saved[-1]:.1f} %")
    return table
