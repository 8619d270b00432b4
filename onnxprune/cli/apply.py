"""`onnxprune apply`: a plan repeated on another model of the same architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxprune.api import apply
from onnxprune.cli.options import with_json
from onnxprune.cli.output import print_json
from onnxprune.cli.prune import show_result


@click.command("apply")
@click.argument("plan", type=click.Path(path_type=Path))
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The pruned model.")
@click.option("--plan", "new_plan", type=click.Path(path_type=Path), help="Write the plan for this model as JSON.")
@click.option("--baseline", type=click.Path(path_type=Path), help="Write the normalised model that belongs to it.")
@with_json
def apply_command(plan: Path, model: Path, as_json: bool, **given: Any) -> int:
    """Cuts MODEL as PLAN says, whatever its weights are."""
    result = apply(plan, model, **given)
    if as_json:
        print_json(result.to_json())
        return 0
    show_result(result)
    return 0
