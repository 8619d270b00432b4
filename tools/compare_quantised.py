"""Pruned, quantised, and both: accuracy against measured time.

    python tools/compare_quantised.py MODEL TRAIN.npz TEST.npz [--macs 0.7 0.5 0.35] [--epochs 0] [-o FILE]

The model as it is and pruned to each share of the MACs, each in float32 and in 8 bits (static, ranges from TRAIN). All
are timed in one process, in turns. Writes top-1 on TEST and how many times as fast as the uncut float32 model each is,
as JSON and as a table: what is as fast as the quantised model, or faster, and better, is worth pruning for.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import onnxprune
from onnxprune import RunOptions
from onnxprune.benchmarking.bench import time_models
from onnxprune.evaluating.evaluate import predict
from onnxprune.evaluating.metrics import find_metric
from onnxprune.evaluating.sources import load_data
from onnxprune.exporting.quantise import quantise
from onnxprune.graph.model import open_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5, 0.35])
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("quantised.json"))
    given = parser.parse_args()
    test = load_data(given.test, open_model(given.model))
    train = load_data(given.train, open_model(given.model)).shuffled(0)
    metric = find_metric("top1", test)
    with tempfile.TemporaryDirectory() as scratch:
        plain = {"uncut": Path(given.model)}
        for share in given.macs:
            path = plain[f"{100 * share:.0f} % of the MACs"] = Path(scratch) / f"{share}.onnx"
            options = RunOptions(target_macs=share, epochs=given.epochs, threads=given.threads, bench_seconds=0.1)
            onnxprune.run(given.model, given.train, output=path, options=options)
        paths = dict(plain)
        for index, (name, path) in enumerate(plain.items()):
            paths[f"{name}, 8 bits"] = Path(scratch) / f"quantised{index}.onnx"
            quantise(path, paths[f"{name}, 8 bits"], "int8", train)
        times = time_models(list(paths.values()), "cpu", given.threads, 20)
        rows: list[dict[str, Any]] = []
        lines = ["| | top-1 | against uncut float32 |", "|---|---|---|"]
        for (name, path), time in zip(paths.items(), times, strict=True):
            top1 = metric.compute(predict(open_model(path), test), test.labels, [])
            rows.append({"name": name, "top1": top1, "speedup": time.speedup, "low": time.low, "high": time.high})
            lines.append(f"| {name} | {top1:.2f} | {time.speedup:.2f}x ({time.low:.2f} to {time.high:.2f}) |")
    given.output.write_text(json.dumps(rows, indent=1) + "\n")
    given.output.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
