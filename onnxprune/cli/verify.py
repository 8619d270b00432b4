"""`onnxprune verify`: the mask oracle, for anyone who doubts."""

from __future__ import annotations

from pathlib import Path

import click

from onnxprune.api import verify
from onnxprune.cli.options import with_json
from onnxprune.cli.output import print_json, say


@click.command("verify")
@click.argument("baseline", type=click.Path(path_type=Path))
@click.argument("pruned", type=click.Path(path_type=Path))
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--seeds", type=int, default=3, metavar="N", help="Sets of random inputs to compare on.")
@with_json
def verify_command(baseline: Path, pruned: Path, plan: Path, seeds: int, as_json: bool) -> int:
    """Sets everything that PLAN removes to zero in BASELINE, and compares it with PRUNED on random inputs.

    BASELINE and PLAN come from `prune --baseline --plan`; a model that was fine-tuned since can't be equal. Exit status
    0 equal, 8 different, 9 not comparable.
    """
    found = verify(baseline, pruned, plan, tuple(range(seeds)))
    if as_json:
        print_json(found.to_json())
    said = (
        f"relative difference {max(found.difference, 0.0):.1e}, allowed {found.tolerance:.0e}, {seeds} sets of inputs"
    )
    if found.outcome == "not comparable":
        said = f"{found.why}; where both can be compared they are equal ({said})"
    elif found.difference <= found.tolerance and found.outcome == "different":
        said = f"{found.why}, more than the outputs' own size"
    say(f"{found.outcome}: {said}")
    return found.exit_status
