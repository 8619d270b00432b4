#!/usr/bin/env python3
"""ablate_repair.py [--models A,B] [--macs 0.75] [--criterion flap] [--folder F] [--out FILE]

Measures what each kind of repair without training is worth.

Cuts real models with samples to a share of the MACs, repairs them with all kinds of layers and with one kind left
alone after the other, and measures on the test samples, which nothing was fitted to: the share of the outputs' spread
that is explained, `1 - sum |y - x|^2 / sum |x - mean x|^2`, x the uncut model's. Nothing is trained. MODELS are names
in a folder with NAME.onnx, NAME_train.npz and NAME_test.npz (ONNXPRUNE_SHARED/real). A kind that a model lacks has no
row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from compare_tuning import SHARED, samples

from onnxprune.choosing.select import Rounding, tau_for
from onnxprune.cutting.cut import cut
from onnxprune.cutting.plan import Plan
from onnxprune.errors import OnnxPruneError
from onnxprune.evaluating.evaluate import predict
from onnxprune.evaluating.metrics import fidelity
from onnxprune.graph.model import open_model
from onnxprune.labels.units import prunable
from onnxprune.normalising.normalise import normalise
from onnxprune.repairing import reconstruct as module
from onnxprune.repairing.find import find_layers
from onnxprune.repairing.recurrent import Recurrent
from onnxprune.repairing.scales import Scaling
from onnxprune.running.trials import DATA_CRITERIA
from onnxprune.scoring.cost import Cost
from onnxprune.scoring.lineup import line_up
from onnxprune.scoring.score import normalise_scores, score_units

KINDS: dict[str, Callable[[Any], bool]] = {
    "recurrent": lambda layer: isinstance(layer, Recurrent),
    "quantised": lambda layer: any(".floats" in (value.name or "") for value in weights(layer)),
    "shared": lambda layer: len(layer.nodes) > 1,
    "normalisation": lambda layer: not isinstance(layer, Recurrent) and isinstance(layer.uses[0].product, Scaling),
    "all": lambda layer: True,
}


def weights(layer: Any) -> list[Any]:
    """The initializers that a layer's fit changes, without biases."""
    return layer.weights[:2] if isinstance(layer, Recurrent) else [layer.weight]


def measure(folder: Path, name: str, macs: float, criterion: str) -> list[dict[str, Any]]:
    """A row for the cut model, for the repaired one, and for each kind that is left alone."""
    model = normalise(open_model(folder / f"{name}.onnx"))
    train, test = (samples(model, folder / f"{name}_{part}.npz") for part in ("train", "test"))
    units = prunable(model, name)
    moved, cost = line_up(units, "l2", 0), Cost(units)
    raw = DATA_CRITERIA[criterion](units, train) if criterion in DATA_CRITERIA else score_units(units, criterion)
    scores, whole = normalise_scores(units, raw, "gradual"), cost.macs(np.ones(units.count, bool))
    chosen = tau_for(units, scores, Rounding(None), lambda alive: cost.macs(alive) <= macs * whole)
    if chosen is None:
        return []
    pruned, step = cut(units, chosen[1])
    plan, uncut = Plan({}, reordered=moved).then(step), predict(model, test)
    found, rows = find_layers, list[dict[str, Any]]()
    for left in ("", *KINDS):
        dropped = list[Any]()

        def fewer(*given: Any, left: str = left, dropped: list[Any] = dropped) -> Any:
            layers = found(*given)
            dropped += [layer for layer in layers.layers if left and KINDS[left](layer)]
            layers.layers[:] = [layer for layer in layers.layers if layer not in dropped]
            return layers

        candidate, start = pruned.clone(), time.perf_counter()
        vars(module)["find_layers"] = fewer
        module.reconstruct(candidate, model, plan, train, 1)
        vars(module)["find_layers"] = found
        if left and not dropped:
            continue
        explained = round(fidelity(predict(candidate, test), uncut), 4)
        rows.append({"model": name, "macs": round(cost.macs(chosen[1]) / whole, 3), "without": left or "nothing"})
        rows[-1] |= {"layers left alone": len(dropped), "explained": explained}
        rows[-1]["seconds"] = round(time.perf_counter() - start, 1)
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measures all and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="")
    parser.add_argument("--macs", type=float, default=0.75)
    parser.add_argument("--criterion", default="flap")
    parser.add_argument("--folder", type=Path, default=SHARED / "real")
    parser.add_argument("--out", type=Path, default=Path("repair.json"))
    given = parser.parse_args()
    names = given.models.split(",") if given.models else sorted(p.stem for p in given.folder.glob("*.onnx"))
    rows = []
    for name in names:
        try:
            rows += measure(given.folder, name, given.macs, given.criterion)
        except OnnxPruneError as error:
            print(f"{name}: left out: {error}", flush=True)
        given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
