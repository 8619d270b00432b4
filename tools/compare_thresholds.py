"""What each move of the threshold is worth: `python tools/compare_thresholds.py MODEL TRAIN TEST [MODEL TRAIN TEST …]`.

For each model, seed and way to move the threshold one `onnxprune.run` with the same options (by default `--max-drop 1`
and nothing trained), on data of which a part is held back for decisions. Written for all: the MACs, the measured time
and the layers that are left, and what is lost on TEST, which no run saw: points of the metric where TEST has labels,
else of fidelity to the uncut model. JSON, and a table of means over the seeds.
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
from onnxprune.choosing.layers import find_layers
from onnxprune.cutting.plan import load_plan
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.evaluate import predict
from onnxprune.evaluating.metrics import fidelity, find_metric
from onnxprune.evaluating.sources import ImageOptions, as_dataset
from onnxprune.graph.model import open_model
from onnxprune.normalising.normalise import normalise

WAYS: dict[str, dict[str, Any]] = {
    "performance alone": {"moves": ("performance",)},
    "and distribution": {"moves": ("performance", "distribution")},
    "and prices of units": {"layers": 0},
    "and of layers (default)": {},
    "published": {"controller": "published"},
    "published-text": {"controller": "published-text"},
    "recursive": {"controller": "recursive"},
    "recursive-text": {"controller": "recursive-text"},
}


def lost(model: Path, output: Path, test: Dataset) -> float:
    """What is lost on data that no run saw, in points."""
    before, after = (predict(normalise(open_model(path)), Dataset(test.inputs, None)) for path in (model, output))
    if test.labels is None:
        return 100 * (1 - fidelity(after, before))
    metric = find_metric(None, test)
    return metric.drop(metric.compute(before, test.labels, before), metric.compute(after, test.labels, before))


def measure(model: Path, train: str, test: Dataset, options: RunOptions) -> dict[str, Any]:
    """One run."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.onnx"
        report = onnxprune.run(model, train, output=output, options=options)
        dropped = len(load_plan(output.with_suffix(".onnxprune") / "plan.json").layers)
        (speed,) = report.speedup.values()
        return {
            "status": report.exit_status,
            "macs": report.pruned.macs / report.baseline.macs,
            "time": 1 / speed["speedup"],
            "layers": len(find_layers(normalise(open_model(model)))) - dropped,
            "decided": report.target["drop"],
            "lost": lost(model, output if report.quality.written else Path(report.pruned.path), test),
            "rounds": [[r["tau"], r["macs_share"], r["drop_counted"], r["accepted"]] for r in report.rounds],
            "seconds": report.seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="MODEL TRAIN TEST")
    parser.add_argument("--target-macs", type=float, help="in place of an allowed drop")
    parser.add_argument("--max-drop", default="1")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("-o", "--output", type=Path, default=Path("thresholds.json"))
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    asked = {"target_macs": given.target_macs} if given.target_macs else {"max_drop": given.max_drop}
    for name, train, held in zip(*[iter(given.files)] * 3, strict=True):
        model = Path(name)
        test = as_dataset(held, normalise(open_model(model)), ImageOptions())
        for way in given.ways:
            for seed in range(given.seeds):
                options = RunOptions(
                    epochs=given.epochs, seed=seed, threads=given.threads, force=True, **asked, **WAYS[way]
                )
                try:
                    found = measure(model, train, test, options)
                except onnxprune.OnnxPruneError as error:
                    found = {"error": str(error)}
                rows.append({"model": model.stem, "way": way, "seed": seed, **found})
                print(json.dumps({k: v for k, v in rows[-1].items() if k != "rounds"}), flush=True)
                given.output.write_text(json.dumps(rows, indent=1) + "\n")
    print("| model | tau moves by | MACs left | time left | layers left | lost on unseen data |")
    print("|---|---|---|---|---|---|")
    for model_name, way in dict.fromkeys((row["model"], row["way"]) for row in rows):
        kept = [row for row in rows if (row["model"], row["way"]) == (model_name, way) and "error" not in row]
        means = (
            [float(np.mean([row[key] for row in kept])) for key in ("macs", "time", "layers", "lost")] if kept else []
        )
        cells = [f"{means[0]:.3f}", f"{means[1]:.2f}", f"{means[2]:.1f}", f"{means[3]:.2f}"] if means else ["-"] * 4
        print(f"| {model_name} | {way} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
