"""One number against a grid search: `python tools/compare_max_drop.py MODEL TRAIN TEST [MODEL TRAIN TEST …]`.

For each model and seed: `onnxprune.run` with `max_drop` and nothing else; then one round to each fixed share of the
MACs, of which the smallest is kept whose drop, on the same samples that the first run decided by, is allowed. Written
for all: the MACs left, the drop where it was decided, and the drop on TEST, which no run saw; JSON and a table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import onnxprune
from onnxprune import RunOptions
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.evaluate import predict
from onnxprune.evaluating.metrics import find_metric
from onnxprune.evaluating.sources import ImageOptions, as_dataset
from onnxprune.graph.model import open_model
from onnxprune.normalising.normalise import normalise

GRID = 0.8 ** np.arange(1, 14)  # shares of the MACs


def measure(path: str | Path, source: str) -> float:
    model = normalise(open_model(path))
    test = as_dataset(source, model, ImageOptions())
    return find_metric(None, test).compute(predict(model, Dataset(test.inputs, None)), test.labels, [])


def result(model: str, train: str, test: str, uncut: float, options: RunOptions) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "o.onnx"
        report = onnxprune.run(model, train, output=output, options=options)
        tested = uncut - measure(output, test)
    share = report.pruned.macs / report.baseline.macs
    rounds = [
        [record.get(name) for name in ("macs_share", "drop", "drop_error", "accepted")] for record in report.rounds
    ]
    return {
        "macs": share, "decided": report.target["drop"], "tested": tested, "rounds": rounds, "s": report.seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="MODEL TRAIN TEST")
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--grid", type=int, default=len(GRID), help="the first so many shares; 0 for no grid search")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path("max_drop.json"))
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model, train, test in zip(*[iter(given.files)] * 3, strict=True):
        uncut = measure(model, test)
        for seed in range(given.seeds):
            one = result(model, train, test, uncut, RunOptions(max_drop=given.max_drop, seed=seed))
            print(f"{Path(model).name}, seed {seed}: max_drop {one}", flush=True)
            tries: list[dict[str, Any]] = []
            for share in GRID[: given.grid]:
                found = result(model, train, test, uncut, RunOptions(target_macs=float(share), seed=seed))
                print(f"  target_macs {share:.3f}: {found}", flush=True)
                tries.append(found)
            allowed = [each for each in tries if each["decided"] <= given.max_drop]
            best = min(allowed, key=lambda each: each["macs"], default=None)
            row: dict[str, Any] = {
                "model": Path(model).name,
                "seed": seed,
                "uncut": uncut,
                "max_drop": one,
                "grid": best,
                "tries": tries,
            }
            rows.append(row)
            given.output.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        kinds = ("max_drop", "grid")
        cells = [f"{row[k]['macs']:.3f} | {row[k]['tested']:+.2f}" if row[k] else "- | -" for k in kinds]
        print(f"| {row['model']} | {row['seed']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
