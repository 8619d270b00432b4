"""`onnxprune verify`: the mask oracle, for anyone who doubts."""

from __future__ import annotations

from pathlib import Path

import click

from onnxprune.api import verify
from onnxprune.cli.options import with_json
from onnxprune.cli.output import print_json, say
from onnxprune.errors import ModelError


@click.command("verify", short_help="Compare a pruned model with its masked baseline.")
@click.argument("baseline", type=click.Path(path_type=Path))
@click.argument("pruned", type=click.Path(path_type=Path))
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--seeds", type=int, default=3, metavar="N", help="Sets of random inputs to compare on.")
@with_json
def verify_command(baseline: Path, pruned: Path, plan: Path, seeds: int, as_json: bool) -> int:
    """Sets everything that PLAN removes to zero in BASELINE, and compares it with PRUNED on random inputs.

    BASELINE and PLAN come from `prune --baseline --plan`; a model that was fine-tuned since can't be equal. Exit status
    3 when they differ.
    """
    found = verify(baseline, pruned, plan, tuple(range(seeds)))
    if as_json:
        print_json(found.to_json())
    elif found.open_nodes:
        say(
            f"inexact: {len(found.open_nodes)} nodes mix what was cut with what is left, so both needn't agree "
            f"(relative difference {found.difference:.1e}), first {found.open_nodes[0]!r}"
        )
    elif found.passed:
        say(f"equal: relative difference {found.difference:.1e}, allowed {found.tolerance:.0e}, {seeds} sets of inputs")
    else:
        say(f"different: relative difference {found.difference:.1e}, allowed {found.tolerance:.0e}")
    return 0 if found.passed else ModelError.exit_status
