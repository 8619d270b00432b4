"""What each part is worth: `python tools/ablate.py MODEL TRAIN TEST [--macs 0.7 0.5] [--epochs 3]`.

MODEL is cut by L2 to each share of its MACs, by the same share of every layer and by one threshold, global or gradual.
Written for each cut: the metric on the first 2,000 samples of TEST with nothing repaired; with batch normalisation
re-estimated; with biases fitted to the uncut layers; with weights and biases (ridge regression), alone and with batch
normalisation re-estimated after it. With --epochs also after fine-tuning on TRAIN from the ridge, on labels, on the
uncut model's answers, and on both as `run` does it. Samples are drawn by the seeds; mean and spread over the seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.choosing.select import Rounding, tau_for
from onnxprune.cutting.cut import cut
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.evaluate import predict
from onnxprune.evaluating.metrics import find_metric
from onnxprune.evaluating.sources import ImageOptions, as_dataset
from onnxprune.graph.model import open_model
from onnxprune.labels.units import granularity_for, prunable
from onnxprune.normalising.normalise import normalise
from onnxprune.repairing import reconstruct as module
from onnxprune.repairing.repair import reestimate_batch_norm
from onnxprune.running.options import RunOptions
from onnxprune.scoring.cost import Cost
from onnxprune.scoring.lineup import line_up
from onnxprune.scoring.score import normalise_scores, score_units
from onnxprune.training import Loss, TrainingOptions, fine_tune
from onnxprune.training.client import choose_augmentation

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
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("-o", "--output", type=Path, default=Path("ablation.json"))
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
    raw, rows = score_units(units), list[dict[str, Any]]()
    augmentation = choose_augmentation(model, train, given.threads) if given.epochs else {}

    def tuned(candidate: Any, seed: int, share: float) -> float:
        result, labelled = candidate.clone(), train if share < 1 else Dataset(train.inputs, None)
        options = TrainingOptions(epochs=given.epochs, loss=Loss(distillation=share), threads=given.threads, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            fine_tune(result, model, labelled, Path(folder) / "job", options, augmentation)
        return measure(result)

    def repaired(seed: int) -> dict[str, float]:
        drawn = np.random.default_rng(seed).choice(len(train), min(len(train), 1024), replace=False)
        part = train.take(np.sort(drawn))
        again, biased, fitted = pruned.clone(), pruned.clone(), pruned.clone()
        reestimate_batch_norm(again, part)
        blocks, module._blocks = (
            module._blocks,
            lambda layer, memory: iter([slice(0, 0)] * any(use.bias for use in layer.uses)),
        )
        module.reconstruct(biased, model, plan, part)
        module._blocks, start = blocks, time.perf_counter()
        module.reconstruct(fitted, model, plan, part)
        seconds = time.perf_counter() - start
        both = fitted.clone()
        reestimate_batch_norm(both, part)
        measured = {"BN": again, "bias": biased, "ridge": fitted, "ridge and BN": both}
        found = {**{name: measure(each) for name, each in measured.items()}, "seconds of ridge": seconds}
        if given.epochs:
            shares = {"labels": 0.0, "teacher": 1.0, "both": RunOptions().distillation}
            found.update({f"tuned on {name}": tuned(fitted, seed, share) for name, share in shares.items()})
        return found

    for scope in ("layer", "global", "gradual"):
        scores = normalise_scores(units, raw, scope)
        for share in given.macs:
            chosen = tau_for(units, scores, Rounding(1), lambda alive, share=share: cost.macs(alive) <= share * whole)  # type: ignore[misc]
            if chosen is None:
                print(f"{share:.2f} of the MACs is out of reach")
                continue
            pruned, plan = cut(units, chosen[1])
            found = [{"nothing": measure(pruned), **repaired(seed)} for seed in range(given.seeds)]
            row = {name: [each[name] for each in found] for name in found[0]}
            said = ", ".join(f"{name} {np.mean(v):.1f} ± {np.std(v):.1f}" for name, v in row.items())
            print(f"{scope}, {cost.macs(chosen[1]) / whole:.2f} of the MACs: {said}", flush=True)
            rows.append({"scope": scope, "macs": cost.macs(chosen[1]) / whole, **row})
    given.output.write_text(json.dumps({"metric": metric.name, "uncut": uncut, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
