"""Timing models against each other: one process, interleaved runs, medians, and a confidence interval of the ratio."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from scipy.special import stdtrit

from onnxprune.benchmarking.interleave import LEVELS, MOST_PARTS, WARM_UP, Rows, interleave, open_as
from onnxprune.checks import check_option
from onnxprune.errors import UsageError
from onnxprune.evaluating.evaluate import Batch, inputs_to_time, run_session
from onnxprune.graph.model import external_files, open_session
from onnxprune.graph.threads import allowed_threads, session_options


@dataclass(frozen=True)
class Runtime:
    """How onnxruntime runs the models.

    `optimization` of graphs is none, basic, extended or all; `provider_options` are the execution provider's own. When
    `bound`, inputs and outputs stay on its device (I/O binding), and their transport isn't timed.
    """

    threads: int | None = None
    optimization: str = "all"
    provider_options: Mapping[str, str] = field(default_factory=dict)
    bound: bool = False


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run on one execution provider."""

    median: float
    p90: float
    runs: int


@dataclass(frozen=True)
class Comparison:
    """How many times as fast as the first model, with the bounds of its 95 % confidence interval."""

    speedup: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """Whether the interval excludes one."""
        return self.low > 1 or self.high < 1


@dataclass(frozen=True)
class BenchResult:
    """One model on one execution provider. `memory_bytes` is what loading and running it adds.

    `load_ms` and `first_ms` are milliseconds of creating the session, and of its first run.
    """

    model: str
    provider: str
    latency: Latency
    against_first: Comparison
    memory_bytes: int
    size_bytes: int
    load_ms: float
    first_ms: float

    def to_json(self) -> dict[str, Any]:
        """The result as JSON."""
        return asdict(self)


def find_providers(names: Sequence[str]) -> list[str]:
    """Full names of execution providers; "cpu" or "CPUExecutionProvider" are the same.

    Raises `UsageError` listing what the installed onnxruntime has when one is absent.
    """
    available = onnxruntime.get_available_providers()
    short = {name.removesuffix("ExecutionProvider").lower(): name for name in available}
    found = []
    for name in names:
        key = name.removesuffix("ExecutionProvider").lower()
        if key not in short:
            raise UsageError(
                f"execution provider {name!r} isn't in this onnxruntime; it has: {', '.join(sorted(short))}"
            )
        found.append(short[key])
    return found


def bench_models(
    models: Sequence[str | os.PathLike[str]],
    providers: Sequence[str] = ("cpu",),
    threads: int | None = None,
    batch: int = 1,
    seconds: float = 5.0,
    seed: int = 0,
    precision: float | None = None,
    runtime: Runtime | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[BenchResult]:
    """Times models on random inputs of the first one's shapes, and compares each with the first.

    `shapes` are those of inputs that leave a choice; `runtime` stands for `threads` and more. With a `precision` it
    ends before its `seconds` are spent when all intervals are narrower than that share. Runs take turns, so that
    whatever else the machine does hits all of them; the order turns too. Raises `UsageError` for an absent execution
    provider and `ModelError` for a model that can't be run.
    """
    if not models:
        raise UsageError("nothing to time: name a model or more")
    for name, value, hint, least in (
        ("ep", providers, tuple[str, ...], None), ("threads", threads, int | None, 1), ("batch", batch, int, 1),
        ("seconds", seconds, float, 0.0), ("seed", seed, int, 0), ("precision", precision, float | None, 0.0),
    ):  # fmt: skip
        check_option(name, value, hint, least)
    full, paths = find_providers(providers), [Path(model) for model in models]
    inputs, runtime = inputs_to_time(paths[0], seed, batch, shapes), runtime or Runtime(threads)
    results = []
    for provider in full:
        rows, starts = _interleave(paths, provider, inputs, runtime, seconds, precision)
        memory = [added_memory(path, provider, runtime.threads, inputs) for path in paths]
        results += results_of(paths, provider, rows, starts, memory)
    return results


def results_of(
    paths: Sequence[Path],
    provider: str,
    times: NDArray[np.float64],
    starts: Sequence[tuple[float, float]],
    memory: Sequence[int],
) -> list[BenchResult]:
    """The figures of each model, from seconds of shape (models, parts, runs), and those of loading and a first run."""
    return [
        BenchResult(
            str(path),
            provider,
            Latency(float(np.median(row)) * 1e3, float(np.quantile(row, 0.9)) * 1e3, row.size),
            compare(times[0], row),
            added,
            model_bytes(path),
            load * 1e3,
            first * 1e3,
        )
        for path, row, (load, first), added in zip(paths, times, starts, memory, strict=True)
    ]


def time_models(
    paths: Sequence[Path],
    provider: str = "cpu",
    threads: int | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[Comparison]:
    """How many times as fast as the first each model is, at batch size 1 where there is a choice."""
    inputs = inputs_to_time(paths[0], seed, 1, shapes)
    times, _ = _interleave(paths, find_providers([provider])[0], inputs, Runtime(threads), seconds)
    return [compare(times[0], row) for row in times]


def _interleave(
    paths: Sequence[Path],
    provider: str,
    inputs: Batch,
    runtime: Runtime,
    seconds: float,
    precision: float | None = None,
) -> tuple[NDArray[np.float64], list[tuple[float, float]]]:
    """Seconds of every run, of shape (models, parts, runs); for each model those of loading and of its first run."""
    runtime = replace(runtime, threads=allowed_threads(runtime.threads))
    for path in paths:  # once, for an error that says what is wrong
        run_session(open_session(str(path), _options(runtime), [(provider, dict(runtime.provider_options))]), inputs)
    openers = [partial(open_as, onnxruntime, str(path), provider, asdict(runtime)) for path in paths]
    rows, starts = interleave(
        openers, dict(inputs), seconds, lambda rows: precision is not None and _width(rows) <= precision
    )
    return np.array(rows), starts


def _options(runtime: Runtime) -> onnxruntime.SessionOptions:
    options = session_options(runtime.threads)
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[runtime.optimization])
    return options


def _width(rows: Rows) -> float:
    """The widest interval of a ratio so far, as a share of the ratio."""
    first = np.array(rows[0])
    found = [compare(first, np.array(row)) for row in rows[1:]]
    return max(((each.high - each.low) / each.speedup for each in found), default=0.0)


def _node_events(
    path: Path, provider: str, runtime: Runtime, batch: int, runs: int, shapes: Mapping[str, Sequence[int]] | None
) -> list[dict[str, Any]]:
    """What the runtime's profile says of every node of every run, warm-up included."""
    inputs = inputs_to_time(path, 0, batch, shapes)
    with tempfile.TemporaryDirectory() as folder:
        options = _options(runtime)
        options.enable_profiling, options.profile_file_prefix = True, str(Path(folder) / "profile")
        session = open_session(str(path), options, [(provider, dict(runtime.provider_options))])
        for _ in range(WARM_UP + runs):
            run_session(session, inputs)
        events = json.loads(Path(cast(Any, session).end_profiling()).read_text())
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith("kernel_time")]


def fallen_back(
    path: Path,
    provider: str,
    runtime: Runtime | None = None,
    batch: int = 1,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> tuple[int, int]:
    """How many nodes ran on the CPU though another execution provider was asked for, and how many there are."""
    nodes = _node_events(path, find_providers([provider])[0], runtime or Runtime(), batch, 0, shapes)
    on_cpu = sum(event["args"].get("provider") == "CPUExecutionProvider" for event in nodes)
    return on_cpu // WARM_UP, len(nodes) // WARM_UP


@dataclass(frozen=True)
class OperatorTime:
    """How long the nodes of one operator take in a run, as the runtime's own profile has it, after its fusions."""

    operator: str
    nodes: int
    milliseconds: float
    share: float


def profile_model(
    path: Path,
    provider: str = "cpu",
    runtime: Runtime | None = None,
    batch: int = 1,
    runs: int = 20,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> list[OperatorTime]:
    """Time by operator, the longest first. Operators named Nchwc are on the blocked path; Reorder is the way there.

    Raises as `bench_models` does.
    """
    nodes = _node_events(path, find_providers([provider])[0], runtime or Runtime(), batch, runs, shapes)
    spent, names = Counter[str](), dict[str, set[str]]()
    each_run = len(nodes) // (WARM_UP + runs)
    for event in nodes[WARM_UP * each_run :]:
        kind = event["args"]["op_name"]
        blocked = "nchwc" in event["name"].lower() or event["args"].get("node_domain", "").endswith("nchwc")
        kind = f"Nchwc {kind}" if blocked else kind
        spent[kind] += event["dur"]
        names.setdefault(kind, set()).add(event["name"])
    total = max(sum(spent.values()), 1)
    return [OperatorTime(op, len(names[op]), us / runs / 1e3, us / total) for op, us in spent.most_common()]


def compare(first: NDArray[np.float64], other: NDArray[np.float64]) -> Comparison:
    """The ratio of medians, first over other, the geometric mean over parts, and its 95 % interval by Student's t.

    Seconds of runs, by part (parts, runs), or in one row, which is parted. Runs of a part depend on each other (where
    sessions lie in memory, clock, cache, other processes), so that only parts count as independent.
    """
    pairs = zip(*(row if row.ndim == 2 else np.array_split(row, MOST_PARTS) for row in (first, other)), strict=True)
    logs = np.log([np.median(a) / np.median(b) for a, b in pairs])
    mean, error = float(logs.mean()), 0.0
    if len(logs) > 1:
        error = float(stdtrit(len(logs) - 1, 0.975) * logs.std(ddof=1) / np.sqrt(len(logs)))
    return Comparison(float(np.exp(mean)), float(np.exp(mean - error)), float(np.exp(mean + error)))


def added_memory(path: Path, provider: str, threads: int | None, inputs: Mapping[str, NDArray[Any]]) -> int:
    """Bytes that loading and running a model once adds to the memory of a process of its own; 0 if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "inputs.npz"
        np.savez(place, **inputs)  # type: ignore[arg-type]
        given = (path, provider, allowed_threads(threads) or 0, place)
        command = [sys.executable, "-m", "onnxprune.benchmarking.footprint", *map(str, given)]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def model_bytes(path: Path) -> int:
    """Bytes on disk of a model, external data included."""
    return path.stat().st_size + sum(file.stat().st_size for file in external_files(path))
