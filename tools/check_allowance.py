#!/usr/bin/env python3
"""check_allowance.py [--runs 200] [--seed 0] [--out FILE]: does `run` keep what a metric's allowance promises?

Each run trains a tiny network in closed form, draws a metric of random direction, scale (1e-4 to 1e4) and offset, with
or without labels, declared or not, and calls `run` by its defaults, as a user would. What is handed over is then
measured on data that the run never saw. Written are one row for each run, and how many kept their allowance, ended with
another status, and lost MACs. A run breaks its promise when it ends with 0 and lost more than the allowance and what
chance may do (three standard errors of the paired difference).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune import OnnxPruneError, RunOptions

CLASSES, FEATURES = 6, 12
UNSEEN = 4000


@dataclass(frozen=True)
class Row:
    """One run: what was drawn, and what came of it. `lost` and `allowed` are shares of the metric's scale."""

    seed: int
    kind: str
    declared: bool
    status: int
    macs: float
    lost: float
    allowed: float
    error: float
    said: str

    @property
    def kept(self) -> bool:
        """Whether the allowance holds on data that the run never saw, or the status says that it may not."""
        return self.status != 0 or self.lost <= self.allowed + 3 * self.error


Samples = tuple[NDArray[np.float32], NDArray[Any]]


def task(rng: np.random.Generator, regression: bool, count: int, centres: NDArray[np.float64]) -> Samples:
    """Samples of blobs with their classes, or of a smooth function with noise."""
    if not regression:
        labels = rng.integers(0, CLASSES, count)
        return (centres[labels] + rng.standard_normal((count, FEATURES))).astype(np.float32), labels
    x = rng.uniform(-2, 2, (count, FEATURES)).astype(np.float32)
    y = np.sin(2 * x[:, :1]) + 0.5 * x[:, 1:2] * x[:, 2:3] + 0.1 * rng.standard_normal((count, 1))
    return x, y.astype(np.float32)


def network(rng: np.random.Generator, x: NDArray[np.float32], y: NDArray[Any], hidden: int, path: Path) -> None:
    """A network with one hidden layer at random, and the last one fitted by least squares."""
    first = (rng.standard_normal((FEATURES, hidden)) / 3).astype(np.float32)
    bias = rng.uniform(-1, 1, hidden).astype(np.float32)
    wanted = 6 * np.eye(CLASSES)[y] if y.ndim == 1 else y
    inner = np.c_[np.maximum(x @ first + bias, 0), np.ones(len(x))]
    last = np.linalg.lstsq(inner, wanted, rcond=1e-3)[0].astype(np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="hidden"),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["y"], name="last"),
    ]
    weights = {"w1": first, "b1": bias, "w2": last[:-1].copy(), "b2": last[-1].copy()}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", FEATURES])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", last.shape[1]])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.save(model, path)


def metric_file(folder: Path, name: str, regression: bool, higher: bool, scale: float, offset: float) -> None:
    """A module with the user's metric: accuracy, or the mean absolute error, turned, scaled and moved."""
    sign = 1 if higher != regression else -1
    base = "np.abs(outputs[0] - labels).mean()" if regression else "(outputs[0].argmax(-1) == labels).mean()"
    (folder / f"{name}.py").write_text(
        textwrap.dedent(f"""
            import numpy as np
            import onnxprune

            def told(outputs, labels):
                return {offset!r} + {sign * scale!r} * float({base})

            @onnxprune.metric(higher_is_better={higher}, scale={scale!r})
            def declared(outputs, labels):
                return told(outputs, labels)
            """)
    )


def one_run(seed: int, folder: Path, epochs: int | None = None) -> Row:
    """Draws a task and a metric, runs by defaults (but for epochs), and measures the result on unseen data."""
    rng = np.random.default_rng(seed)
    regression, labelled, declared, higher = (bool(rng.integers(2)) for _ in range(4))
    scale, offset = float(10 ** rng.uniform(-4, 4)), float(rng.normal() * 10 ** rng.uniform(-4, 4))
    centres = rng.standard_normal((CLASSES, FEATURES)) * 1.1
    x, y = task(rng, regression, 1500, centres)
    network(rng, x, y, int(rng.choice([64, 128, 192])), folder / "model.onnx")
    data, unseen = task(rng, regression, 1200, centres), task(rng, regression, UNSEEN, centres)
    name = f"mine_{seed}"
    metric_file(folder, name, regression, higher, scale, offset)
    sys.path.insert(0, str(folder))
    given = {"x": data[0]} | ({"labels": data[1]} if labelled else {})
    chosen = f"{name}:{'declared' if declared else 'told'}" if labelled else None
    kind = f"{'regression' if regression else 'classes'}{'' if labelled else ', no labels'}"
    options = RunOptions(metric=chosen, epochs=epochs, threads=1, bench_seconds=0.2, seed=seed % 7)
    try:
        report = onnxprune.run(folder / "model.onnx", given, output=folder / "out.onnx", options=options)
        status, macs, said = report.exit_status, report.pruned.macs / report.baseline.macs, ""
    except OnnxPruneError as error:
        status, macs, said = error.exit_status, 1.0, str(error)[:120]
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)
    lost, error_of = 0.0, 0.0
    if (folder / "out.onnx").exists():
        lost, error_of = _lost(folder, unseen, regression, labelled)
    return Row(seed, kind, declared and labelled, status, macs, lost, 0.01, error_of, said)


def _lost(folder: Path, unseen: Samples, regression: bool, labelled: bool) -> tuple[float, float]:
    """What was lost on unseen samples as a share of the scale, and its standard error."""
    x, y = unseen
    before, after = (
        np.asarray(onnxruntime.InferenceSession(str(folder / name)).run(None, {"x": x})[0])
        for name in ("model.onnx", "out.onnx")
    )
    if not labelled:  # the share of the spread that is kept
        spread = ((before - before.mean(0)) ** 2).sum(1)
        parts = ((before - after) ** 2).sum(1) / spread.mean()
    elif regression:  # mean absolute errors, whose declared scale is 1
        parts = (np.abs(after - y) - np.abs(before - y)).mean(1)
    else:
        parts = (before.argmax(1) == y).astype(float) - (after.argmax(1) == y)
    return float(parts.mean()), float(parts.std() / len(parts) ** 0.5)


def main() -> None:
    """Runs all, and writes rows and a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("allowance.json"))
    given = parser.parse_args()
    rows = []
    for seed in range(given.seed, given.seed + given.runs):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(one_run(seed, Path(folder)))
        print(rows[-1], "" if rows[-1].kept else "  <-- not kept", flush=True)
    told = [row for row in rows if row.declared]
    summary = {
        "runs": len(rows),
        "kept": sum(row.kept for row in rows),
        "declared": len(told),
        "declared, status 0 and fewer MACs": sum(row.status == 0 and row.macs < 1 for row in told),
        "no labels": sum("no labels" in row.kind for row in rows),
        "no labels, status 0 and fewer MACs": sum(
            row.status == 0 and row.macs < 1 for row in rows if "no labels" in row.kind
        ),
    }
    given.out.write_text(json.dumps({"summary": summary, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
