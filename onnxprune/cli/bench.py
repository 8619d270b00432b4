"""`onnxprune bench`: times models against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.table import Table

from onnxprune.benchmarking.bench import (
    BenchResult,
    OperatorTime,
    Runtime,
    bench_models,
    fallen_back,
    find_providers,
    profile_model,
)
from onnxprune.benchmarking.interleave import LEVELS, ON_GPU
from onnxprune.benchmarking.probe import CPU
from onnxprune.benchmarking.remote import SCRIPT, bench_by_ssh, full_name, write_bundle
from onnxprune.cli.options import PairType, ShapeType, with_json
from onnxprune.cli.output import PlainTable, print_json, say, show
from onnxprune.errors import UsageError


@click.command("bench")
@click.argument("models", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--ep", multiple=True, default=("cpu",), metavar="NAME", help="Execution providers; repeatable.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads of onnxruntime.")
@click.option(
    "--batch", type=click.IntRange(1), default=1, metavar="N", help="Samples in a run, where the model lets you choose."
)
@click.option(
    "--seconds", type=click.FloatRange(0.1), default=5.0, metavar="F", help="How long to time on each provider."
)
@click.option(
    "--precision",
    type=click.FloatRange(0, min_open=True),
    metavar="F",
    help="End when the ratio is known so well: 0.02.",
)
@click.option(
    "--shape", "shapes", multiple=True, type=ShapeType(), metavar="INPUT=N,N…", help="Of an input; repeatable."
)
@click.option(
    "--optimization", type=click.Choice(list(LEVELS)), default="all", help="What onnxruntime may do to the graphs."
)
@click.option(
    "--provider-option",
    "provider_options",
    multiple=True,
    type=PairType(),
    metavar="KEY=VALUE",
    help="Of the execution provider; repeatable.",
)
@click.option("--io-binding", "bound", is_flag=True, help="Inputs and outputs stay on the device; only runs are timed.")
@click.option("--profile", is_flag=True, help="Also show how long which operators take, on the first provider.")
@click.option(
    "--target",
    metavar="ssh:HOST|script:FOLDER",
    help="Time on another machine: [user@]host[:port] by ssh, or write a folder to be run there by hand.",
)
@click.option("--python", default="python3", metavar="COMMAND", help="Python on the other machine.")
@with_json
def bench_command(
    models: tuple[Path, ...],
    ep: tuple[str, ...],
    threads: int | None,
    batch: int,
    seconds: float,
    precision: float | None,
    shapes: tuple[tuple[str, tuple[int, ...]], ...],
    optimization: str,
    provider_options: tuple[tuple[str, str], ...],
    bound: bool,
    profile: bool,
    target: str | None,
    python: str,
    as_json: bool,
) -> int:
    """Times MODELS on random inputs: one process, interleaved runs; each is compared with the first."""
    kind, _, place = (target or "").partition(":")
    if target is not None and (kind not in ("ssh", "script") or not place):
        raise UsageError(f"--target {target}: give ssh:HOST or script:FOLDER")
    if target is not None and (precision or profile):
        raise UsageError("--precision and --profile are for this machine, not for a --target")
    runtime, sizes = Runtime(threads, optimization, dict(provider_options), bound), dict(shapes)
    if kind == "script":
        write_bundle(models, Path(place), [full_name(each) for each in ep], runtime, batch, seconds, sizes)
        say(f"written: {place}; on the device, with numpy and onnxruntime: python3 {Path(place).name}/{SCRIPT}")
        return 0
    if kind == "ssh":
        results, machine = bench_by_ssh(place, models, ep, runtime, batch, seconds, python, sizes)
        say(f"on {place}: {machine}")
    else:
        results = bench_models(models, ep, None, batch, seconds, precision=precision, runtime=runtime, shapes=sizes)
        _say_fallbacks(models, ep, runtime, batch, sizes)
    profiles = {str(model): profile_model(model, ep[0], runtime, batch, shapes=sizes) for model in models if profile}
    if as_json:
        operators = {name: [asdict(row) for row in rows] for name, rows in profiles.items()}
        print_json({"results": [result.to_json() for result in results], "profiles": operators})
        return 0
    show(_results(results, len(models)))
    what = "time to launch, by operator" if full_name(ep[0]) in ON_GPU else "by operator"
    for name, rows in profiles.items():
        show(_profile(f"{name}, {what}", rows))
    return 0


def _say_fallbacks(
    models: Sequence[Path], providers: Sequence[str], runtime: Runtime, batch: int, sizes: Mapping[str, Sequence[int]]
) -> None:
    """How many nodes an execution provider left to the CPU."""
    for provider in (each for each in providers if find_providers([each])[0] != CPU):
        for model in models:
            on_cpu, nodes = fallen_back(model, provider, runtime, batch, sizes)
            where = f"{on_cpu} of {nodes} nodes ran on the CPU instead of" if on_cpu else "all on"
            say(f"{model}: {where} {provider}")


COLUMNS = (
    *("model", "provider", "median, ms", "p90, ms", "runs", "against the first", "load, ms", "first run, ms"),
    *("memory, MB", "size, kB"),
)


def _results(results: Sequence[BenchResult], models: int) -> Table:
    table = PlainTable("interleaved runs on random inputs")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("model", "provider") else "right")
    for index, result in enumerate(results):
        table.add_row(
            result.model, result.provider.removesuffix("ExecutionProvider"), f"{result.latency.median:.3f}",
            f"{result.latency.p90:.3f}", str(result.latency.runs), "" if index % models == 0 else verdict(result),
            f"{result.load_ms:.0f}", f"{result.first_ms:.2f}", f"{result.memory_bytes / 1e6:.1f}",
            f"{result.size_bytes / 1e3:,.0f}",
        )  # fmt: skip
    return table


def _profile(title: str, rows: list[OperatorTime]) -> Table:
    table = PlainTable(title)
    for column in ("operator", "nodes", "ms a run", "share"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for row in rows:
        table.add_row(row.operator, str(row.nodes), f"{row.milliseconds:.3f}", f"{100 * row.share:.1f} %")
    return table


def verdict(result: BenchResult) -> str:
    """The ratio with its 95 % interval, or that there is no difference."""
    ratio = result.against_first
    interval = f"{ratio.speedup:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
    return interval if ratio.differs else f"no difference: {interval}"
