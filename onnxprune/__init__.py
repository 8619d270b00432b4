"""onnxprune makes trained ONNX models smaller and faster.

The public names: `run` does everything; `prune` cuts once by weights; `inspect` says what could be cut and why the rest
can't; `sensitivity` measures what each group costs; `apply` repeats a cut on other weights; `verify` checks one;
`bench` times models against each other; `metric` says what a metric function of your own means. Everything raised on
purpose is an `OnnxPruneError`.
"""

from typing import TYPE_CHECKING, Any

from onnxprune.errors import (
    DataError,
    ModelError,
    OnnxPruneError,
    TargetError,
    TrainingError,
    UsageError,
    UselessError,
)

if TYPE_CHECKING:
    from onnxprune.api import Inspection, PruneResult, Verification, apply, inspect, prune, verify
    from onnxprune.benchmarking.bench import BenchResult
    from onnxprune.benchmarking.bench import bench_models as bench
    from onnxprune.choosing.select import Keep
    from onnxprune.choosing.sensitivity import Sensitivity, sensitivity
    from onnxprune.cutting.plan import Plan
    from onnxprune.evaluating.metrics import metric
    from onnxprune.evaluating.sources import ImageOptions
    from onnxprune.running.options import RunOptions
    from onnxprune.running.pipeline import run
    from onnxprune.running.report import Report

__version__ = "0.1.0"

_HOMES = {  # imported when first used: the training worker must not load the user's onnxruntime
    "Inspection": "api", "PruneResult": "api", "inspect": "api", "prune": "api",
    "apply": "api", "verify": "api", "Verification": "api", "Keep": "choosing.select",
    "BenchResult": "benchmarking.bench", "bench": "benchmarking.bench", "ImageOptions": "evaluating.sources",
    "metric": "evaluating.metrics",
    "RunOptions": "running.options", "run": "running.pipeline", "Plan": "cutting.plan", "Report": "running.report",
    "Sensitivity": "choosing.sensitivity", "sensitivity": "choosing.sensitivity",
}  # fmt: skip

__all__ = [
    "BenchResult",
    "DataError",
    "ImageOptions",
    "Inspection",
    "Keep",
    "ModelError",
    "OnnxPruneError",
    "Plan",
    "PruneResult",
    "Report",
    "RunOptions",
    "Sensitivity",
    "TargetError",
    "TrainingError",
    "UsageError",
    "UselessError",
    "Verification",
    "apply",
    "bench",
    "inspect",
    "metric",
    "prune",
    "run",
    "sensitivity",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxprune' has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f"onnxprune.{_HOMES[name]}")
    return getattr(module, "bench_models" if name == "bench" else name)
