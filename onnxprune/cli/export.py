"""`onnxprune export`: a model for a device."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from onnxprune.benchmarking.bench import model_bytes
from onnxprune.cli.options import IMAGE_OPTIONS, image_options, options, with_json
from onnxprune.cli.output import print_json, say
from onnxprune.evaluating.sources import load_data
from onnxprune.exporting.quantise import NUMBERS, ORT, Numbers, as_ort, quantise
from onnxprune.graph.model import check_outputs, open_model, save_model


@click.command("export")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="An .onnx or .ort file.")
@click.option(
    "--quantize", "numbers", type=click.Choice(NUMBERS), help="int8 needs --data; dynamic is for transformers."
)
@click.option("--data", multiple=True, help="What ranges of activations are taken from; repeatable.")
@options(IMAGE_OPTIONS)
@with_json
def export_command(
    model: Path, output: Path, numbers: Numbers | None, data: tuple[str, ...], as_json: bool, **given: object
) -> int:
    """Writes MODEL with smaller numbers, or in onnxruntime's own format where OUTPUT ends in .ort."""
    images = image_options(dict(given))
    check_outputs(model, [output], data)
    opened = open_model(model)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model.onnx"
        if numbers is None:
            save_model(opened, place)
        else:
            quantise(model, place, numbers, load_data(data, opened, images).shuffled(0) if data else None)
        if output.suffix == ORT:
            as_ort(place, output)
        else:
            save_model(open_model(place), output)
    sizes = {"before": model_bytes(model), "after": output.stat().st_size}
    if as_json:
        print_json({"output": str(output), "size_bytes": sizes})
    else:
        say(f"written: {output}, {sizes['after'] / 1e3:,.0f} kB, from {sizes['before'] / 1e3:,.0f} kB")
    return 0
