"""Gradients beside PyTorch's: the same file, samples, and cross-entropy, in training mode.

    python tools/compare_gradients.py MODEL=CLASSES … --peer-python PYTHON [-o FILE]

PYTHON is an interpreter with torch and onnx2torch. Parameters are matched by their values. For each trainer it writes
the largest difference of a parameter's gradient, relative to the norm of PyTorch's, as JSON and as a table (or relative
to a ten-thousandth of the norm of all gradients, if that is more: some are 0 but for rounding).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.evaluating.data import Dataset, random_inputs
from onnxprune.graph.model import open_model, save_model
from onnxprune.normalising.normalise import normalise
from onnxprune.training import Loss, Trainer, TrainingOptions, client

SAMPLES = 32  # one shard: batch normalisation sees the same statistics in both

PEER = """
import sys
import numpy as np, torch
from onnx2torch import convert
path, folder = sys.argv[1:]
model = convert(path).train()
x, y = (torch.tensor(np.load(f"{folder}/{name}.npy")) for name in ("x", "y"))
torch.nn.functional.cross_entropy(model(x), y).backward()
found = [(p.detach().numpy(), p.grad.numpy()) for p in model.parameters() if p.grad is not None]
np.savez(f"{folder}/peer.npz", **{f"{kind}{i}": pair[k] for i, pair in enumerate(found) for k, kind in enumerate("wg")})
"""


def compare(path: str, classes: int, python: str, folder: Path) -> dict[str, Any]:
    """The figures of one model."""
    model = normalise(open_model(path))
    save_model(model, folder / "model.onnx")
    ((name, x),) = random_inputs(model, 0, SAMPLES).items()
    y = np.random.default_rng(0).integers(0, classes, SAMPLES)
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    words = [python, "-c", PEER, str(folder / "model.onnx"), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"PyTorch failed on {path}: {done.stderr.strip().splitlines()[-1]}")
    peer = np.load(folder / "peer.npz")
    pairs = [(peer[f"w{i}"], peer[f"g{i}"]) for i in range(len(peer.files) // 2)]
    row: dict[str, Any] = {"model": Path(path).name}
    trainers: tuple[Trainer, ...] = ("ort", "graph")
    for trainer in trainers:
        options = TrainingOptions(trainer, threads=1, loss=Loss(distillation=0.0), batch_statistics=True)
        found = client.gradient_moments(model, Dataset({name: x}, y), folder / trainer, options)
        worst, matched = 0.0, 0
        least = 1e-4 * float(np.sqrt(sum(np.square(g).sum() for _, g in pairs)))
        for parameter, (gradient, _) in found.items():
            value = model.graph.initializers[parameter].const_value.numpy()  # type: ignore[union-attr]
            for weights, wanted in pairs:
                turned = value.T.shape == weights.shape and value.ndim == 2 and np.array_equal(value.T, weights)
                if turned or (value.shape == weights.shape and np.array_equal(value, weights)):
                    ours = gradient.T if turned else gradient
                    apart, size = (float(np.linalg.norm(each)) for each in (ours - wanted, wanted))
                    worst = max(worst, apart / max(size, least))
                    matched += 1
                    break
        row[trainer] = {"worst": worst, "matched": matched, "parameters": len(found)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL=CLASSES")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("-o", "--output", type=Path, default=Path("gradients.json"))
    given = parser.parse_args()
    rows = []
    lines = ["| model | ONNX Runtime training | gradients as nodes | parameters compared |", "|---|---|---|---|"]
    for entry in given.models:
        path, _, classes = entry.partition("=")
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row := compare(path, int(classes), given.peer_python, Path(folder)))
        worst = [f"{row[trainer]['worst']:.1e}" for trainer in ("ort", "graph")]
        lines.append(
            f"| {row['model']} | {' | '.join(worst)} | {row['ort']['matched']} of {row['ort']['parameters']} |"
        )
        print(lines[-1], flush=True)
    given.output.write_text(json.dumps(rows, indent=1) + "\n")
    given.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
