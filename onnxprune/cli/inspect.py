"""`onnxprune inspect`: what can be pruned, and why the rest can't."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click
from rich.table import Table

from onnxprune.api import Inspection, inspect
from onnxprune.cli.options import with_json
from onnxprune.cli.output import PlainTable, print_json, say, show

HALF = 0.5


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--granularity",
    type=click.Choice(["auto", "rows", "columns"]),
    default="auto",
    help="Heads and groups: whole (rows) or thinner (columns).",
)
@with_json
def inspect_command(model: Path, granularity: str, as_json: bool) -> int:
    """Lists the groups of coupled units in MODEL, what they govern, and what is locked with the reason."""
    found = inspect(model, granularity)  # type: ignore[arg-type]
    if as_json:
        print_json(found.to_json())
        return 0
    show(_groups(found))
    if found.layers:
        show(_layers(found))
    show(_locks(found))
    say(
        f"{found.macs:,} MACs and {found.params:,} parameters; with one unit left in every group "
        f"{100 * found.reachable_macs:.0f} % of the MACs and {100 * found.reachable_params:.0f} % of the parameters go"
    )
    say(f"repair without training reaches {100 * found.repairable_macs:.0f} % of the MACs with weights")
    for reason, count in Counter(found.unrepairable.values()).most_common():
        say(f"{count} nodes aren't repaired: {reason}")
    for reason, count in Counter(found.untrainable.values()).most_common():
        say(f"{count} initializers can't be fine-tuned: {reason}")
    if found.reachable_params < HALF and found.locks:
        reason, numbers = _by_reason(found)[0]
        say(f"what holds most of it back: {reason} ({100 * numbers / max(found.params, 1):.0f} % of the parameters)")
    return 0


def _groups(found: Inspection) -> Table:
    table = PlainTable(f"{len(found.groups)} groups that can be pruned")
    for name, justify in (
        ("group", "left"),
        ("kind", "left"),
        ("units", "right"),
        ("MACs governed", "right"),
        ("parameters governed", "right"),
        ("tensors", "right"),
        ("exact", "left"),
    ):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for group in found.groups:
        table.add_row(
            group["name"], group["kind"], str(group["units"]), f"{group['macs']:,}", f"{group['params']:,}",
            str(len(group["members"])), "yes" if group["exact"] else "no",
        )  # fmt: skip
    return table


def _layers(found: Inspection) -> Table:
    table = PlainTable(f"{len(found.layers)} layers that can be dropped")
    table.add_column("layer")
    for name in ("parameters", "nodes"):
        table.add_column(name, justify="right")
    for layer in found.layers:
        table.add_row(layer["name"], f"{layer['params']:,}", str(layer["nodes"]))
    return table


def _by_reason(found: Inspection) -> list[tuple[str, int]]:
    """The numbers that each reason locks, in either of their axes, the most first."""
    counts: Counter[str] = Counter()
    for lock in found.locks:
        counts[lock["reason"]] += lock["numbers"]
    return counts.most_common()


def _locks(found: Inspection) -> Table:
    table = PlainTable("locked axes of parameters, by reason")
    for name in ("reason", "example", "locked by node"):
        table.add_column(name)
    for name in ("axes", "parameters along them"):
        table.add_column(name, justify="right")
    for reason, numbers in _by_reason(found):
        locks = [lock for lock in found.locks if lock["reason"] == reason]
        example = max(locks, key=lambda lock: lock["numbers"])
        table.add_row(
            reason, f"{example['value']}, axis {example['axis']}", example["node"], str(len(locks)), f"{numbers:,}"
        )
    return table
