"""`onnxprune bench`: times models against each other."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from onnxprune.bench import BenchResult, bench_models
from onnxprune.cli.options import with_json
from onnxprune.cli.output import print_json, show


@click.command("bench", short_help="Time models against each other.")
@click.argument("models", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--ep", multiple=True, default=("cpu",), metavar="NAME", help="Execution providers; repeatable.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads of onnxruntime.")
@click.option(
    "--batch", type=click.IntRange(1), default=1, metavar="N", help="Samples in a run, where the model lets you choose."
)
@click.option(
    "--seconds", type=click.FloatRange(0.1), default=5.0, metavar="F", help="How long to time on each provider."
)
@with_json
def bench_command(
    models: tuple[Path, ...], ep: tuple[str, ...], threads: int | None, batch: int, seconds: float, as_json: bool
) -> int:
    """Times MODELS on random inputs: one process, interleaved runs; each is compared with the first."""
    results = bench_models(models, ep, threads, batch, seconds)
    if as_json:
        print_json({"results": [result.to_json() for result in results]})
        return 0
    table = Table(title="interleaved runs on random inputs")
    for name in ("model", "provider", "median, ms", "p90, ms", "runs", "against the first", "memory, MB", "size, kB"):
        table.add_column(name, justify="left" if name in ("model", "provider") else "right")
    for index, result in enumerate(results):
        table.add_row(
            result.model, result.provider.removesuffix("ExecutionProvider"), f"{result.latency.median:.3f}",
            f"{result.latency.p90:.3f}", str(result.latency.runs), "" if index % len(models) == 0 else verdict(result),
            f"{result.memory_bytes / 1e6:.1f}", f"{result.size_bytes / 1e3:,.0f}",
        )  # fmt: skip
    show(table)
    return 0


def verdict(result: BenchResult) -> str:
    """The ratio with its 95 % interval, or that there is no difference."""
    ratio = result.against_first
    interval = f"{ratio.speedup:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
    return interval if ratio.differs else f"no difference: {interval}"
