"""What each repair is worth without training: `python tools/compare_repair.py MODEL TRAIN TEST [--macs 0.7 0.5]`.

MODEL is cut by the global L2 score to each share of its MACs. Written for each: the metric on the first 2,000 samples
of TEST with nothing repaired, with batch normalisation re-estimated, and with layers fitted to the uncut ones (ridge
regression), on samples of TRAIN drawn by the seeds; mean and spread over the seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune import reconstruct as module
from onnxprune.cost import Cost
from onnxprune.cut import cut
from onnxprune.data import ImageOptions, as_dataset
from onnxprune.evaluate import find_metric, predict
from onnxprune.lineup import line_up
from onnxprune.model import open_model
from onnxprune.normalise import normalise
from onnxprune.repair import reestimate_batch_norm
from onnxprune.score import normalise_scores, score_units
from onnxprune.select import Rounding, tau_for
from onnxprune.units import granularity_for, prunable

TEST = 2000  # samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.67, 0.5])
    parser.add_argument("--kinds", nargs="*", default=[])
    parser.add_argument("--samples", type=int, default=module.SAMPLES, help="for calibration")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, default=Path("repair.json"))
    given = parser.parse_args()
    module.SAMPLES = given.samples
    granularity = granularity_for("auto", given.kinds)
    model = normalise(open_model(given.model))
    units = prunable(model, given.model, granularity, given.kinds)
    line_up(units)
    train, test = (as_dataset(source, model, ImageOptions()) for source in (given.train, given.test))
    test = test.take(slice(0, TEST))
    metric, cost = find_metric(None, test), Cost(units)
    reference = predict(model, test)

    def measure(candidate: Any) -> float:
        return metric.compute(predict(candidate, test), test.labels, reference)

    uncut, whole = metric.compute(reference, test.labels, reference), cost.macs(np.ones(units.count, bool))
    print(f"uncut: {metric.name} {uncut:.2f}")
    scores, rows = normalise_scores(units, score_units(units), "global"), list[dict[str, Any]]()
    for share in given.macs:
        chosen = tau_for(units, scores, Rounding(1), lambda alive, share=share: cost.macs(alive) <= share * whole)  # type: ignore[misc]
        if chosen is None:
            print(f"{share:.2f} of the MACs is out of reach")
            continue
        pruned, plan = cut(units, chosen[1])
        found: dict[str, list[float]] = {"nothing": [measure(pruned)], "batch norm": [], "ridge": [], "seconds": []}
        for seed in range(given.seeds):
            drawn = np.random.default_rng(seed).choice(len(train), min(len(train), 1024), replace=False)
            part = train.take(np.sort(drawn))
            again, fitted = pruned.clone(), pruned.clone()
            reestimate_batch_norm(again, part)
            start = time.perf_counter()
            module.reconstruct(fitted, model, plan, part)
            found["seconds"].append(time.perf_counter() - start)
            found["batch norm"].append(measure(again))
            found["ridge"].append(measure(fitted))
        said = ", ".join(f"{name} {np.mean(v):.1f} ± {np.std(v):.1f}" for name, v in found.items())
        print(f"{cost.macs(chosen[1]) / whole:.2f} of the MACs: {said}", flush=True)
        rows.append({"macs": cost.macs(chosen[1]) / whole, **found})
    given.output.write_text(json.dumps({"metric": metric.name, "uncut": uncut, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
