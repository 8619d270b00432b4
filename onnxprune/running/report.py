"""What a run found, as data: report.json and the tables are made from it."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import pairwise
from typing import Any

import onnx_ir as ir
import onnxruntime

from onnxprune.benchmarking.bench import BenchResult
from onnxprune.errors import TargetError, UselessError
from onnxprune.graph.model import constant
from onnxprune.labels.flow import integer


def decimals(*values: float) -> int:
    """How many decimals show two digits of the smallest difference between these numbers, from 2 to 9."""
    finite = sorted(value for value in values if math.isfinite(value))
    gaps = [b - a for a, b in pairwise(finite) if b - a > 1e-12 * max(abs(a), abs(b))]
    return min(9, max(2, 1 - math.floor(math.log10(min(gaps))))) if gaps else 2


@dataclass(frozen=True)
class Quality:
    """How good a result is, and beside what.

    `useful` is how much is left of what the uncut model has above guessing; `floor` is what is wanted at least.
    `guess` is the metric of guessing. `noise` is what the uncut model keeps on inputs that are off by their own
    rounding, by figure. `written` says whether the result was handed over. Of what wasn't `measured` all is None.
    """

    measured: bool
    metric: str | None = None
    useful: float | None = None
    floor: float | None = None
    guess: float | None = None
    higher_is_better: bool | None = None
    scale: float | None = None
    noise: dict[str, float] = field(default_factory=dict)
    unexercised: tuple[str, ...] = ()
    written: bool = True


@dataclass(frozen=True)
class Side:
    """One model: the uncut baseline or the pruned one."""

    path: str
    macs: int
    params: int
    size_bytes: int
    metric: dict[str, Any] | None
    fidelity: dict[str, float]
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Width:
    """A layer's output channels before and after."""

    layer: str
    operator: str
    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """A whole run. `target` says what was asked and reached; `rounds` what each round tried."""

    baseline: Side
    pruned: Side
    rounds: tuple[dict[str, Any], ...]
    widths: tuple[Width, ...]
    target: dict[str, Any]
    speedup: dict[str, dict[str, float]]
    notes: tuple[str, ...]
    run_dir: str
    options: dict[str, Any]
    versions: dict[str, str]
    model_sha256: str
    seconds: float
    quality: Quality
    unchecked: tuple[str, ...] = ()  # why a cut could not be compared with the masked model, where it couldn't
    contest: dict[str, float] = field(default_factory=dict)  # "criterion, scope" -> loss, where either is auto

    @property
    def met(self) -> bool:
        """Whether what was asked was reached."""
        return bool(self.target["met"])

    @property
    def exit_status(self) -> int:
        """0 where what was asked was reached, 7 where the result is of no use and wasn't written, else 5."""
        if not self.quality.written:
            return UselessError.exit_status
        return 0 if self.met else TargetError.exit_status

    def to_json(self) -> dict[str, Any]:
        """The report as JSON."""
        return {**asdict(self), "exit_status": self.exit_status}


def latency_sides(
    results: list[BenchResult],
) -> tuple[list[dict[str, dict[str, float]]], list[dict[str, int]], dict[str, dict[str, float]]]:
    """`latency_ms` and `memory_bytes` of two models by provider, and the second one's speed-up over the first."""
    pairs = [(results[i], results[i + 1]) for i in range(0, len(results), 2)]
    latencies = [{pair[side].provider: asdict(pair[side].latency) for pair in pairs} for side in (0, 1)]
    memory = [{pair[side].provider: pair[side].memory_bytes for pair in pairs} for side in (0, 1)]
    return latencies, memory, {after.provider: asdict(after.against_first) for _, after in pairs}


WIDTH_AT = {  # operator -> (input, axis) whose size is the width of the layer
    "Conv": (1, 0), "ConvTranspose": (1, 1), "Gemm": (1, 1), "MatMul": (1, -1),
    "ConvInteger": (1, 0), "MatMulInteger": (1, -1), "GRU": (2, 2), "LSTM": (2, 2), "RNN": (2, 2),
}  # fmt: skip


def widths(before: ir.Model, after: ir.Model) -> tuple[Width, ...]:
    """Output channels of every convolution, matrix product and recurrent layer with a weight, before and after."""
    found = []
    later = {node.name: node for node in after.graph}
    for node in before.graph:
        if node.op_type not in WIDTH_AT or node.name not in later:
            continue
        index, axis = WIDTH_AT[node.op_type]
        if node.op_type == "Gemm" and integer(node, "transB", 0):
            axis = 0
        weights = [constant(each.inputs[index]) for each in (node, later[node.name])]
        if all(weight is not None for weight in weights):
            found.append(Width(node.name or "", node.op_type, *(int(weight.shape[axis]) for weight in weights)))
    return tuple(found)


def versions() -> dict[str, str]:
    """What a run depends on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("onnxprune", "onnx", "onnx-ir", "onnxruntime", "onnxsim", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # onnxruntime-gpu, -openvino … are other distributions
            found[name] = str(getattr(onnxruntime, "__version__", "")) if name == "onnxruntime" else "unknown"
    return found
