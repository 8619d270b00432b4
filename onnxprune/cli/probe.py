"""`onnxprune probe`: what the target likes."""

from __future__ import annotations

import click

from onnxprune.benchmarking.bench import find_providers
from onnxprune.benchmarking.probe import SPEED_WIDTHS, cache_file, probe
from onnxprune.cli.options import with_json
from onnxprune.cli.output import PlainTable, print_json, say, show


@click.command("probe")
@click.option("--ep", default="cpu", metavar="NAME", help="Execution provider.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads of onnxruntime.")
@click.option("--fresh", is_flag=True, help="Measure again, whatever the cache holds.")
@with_json
def probe_command(ep: str, threads: int | None, fresh: bool, as_json: bool) -> int:
    """Measures the steps in which widths cost time, and how fast operators are; runs use what is found."""
    provider = find_providers([ep])[0]
    found = probe(provider, threads, fresh)
    if as_json:
        print_json(found.to_json())
        return 0
    table = PlainTable(f"{found.machine}, {provider}, onnxruntime {found.onnxruntime}")
    for name in ("operators", "widths in steps of", *(f"MACs a ns at {width}" for width in SPEED_WIDTHS)):
        table.add_column(name, justify="left" if name == "operators" else "right")
    for kind, step in found.steps.items():
        table.add_row(kind, str(step), *(f"{speed:.1f}" for speed in found.speed[kind]))
    show(table)
    say(
        f"weights are read at {found.weights:.1f} numbers a nanosecond, others write {found.elements:.1f}; an operator "
        f"takes {found.overhead:.0f} ns or more"
    )
    say(f"kept in {cache_file(provider, threads)}")
    return 0
