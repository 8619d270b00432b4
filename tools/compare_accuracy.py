"""Accuracy against MACs, beside Torch-Pruning, from the same ONNX file, data and evaluation.

    python tools/compare_accuracy.py MODEL TRAIN.npz TEST.npz --peer-python PYTHON [--macs 0.67 0.48] [--epochs 5]

PYTHON is an interpreter with torch, torch-pruning 1.6, onnx2torch and onnxscript. For each share of the MACs and seed,
both cut the file: onnxprune as its `run` does, calibrated on SAMPLES images drawn from TRAIN by the seed; Torch-Pruning
by group L2 over all layers, batch normalisation re-estimated on the same images. onnxsim's structured pruning, by L2,
has no seed. With --epochs both are trained on TRAIN with AdamW and the same schedule (onnxprune as by default: it
distils, keeps batch normalisation's statistics, takes steps in proportion, at --lr or a rate by the number of matrices,
and goes without what it holds back of TRAIN; Torch-Pruning at --peer-lr). What is written is accuracy on TEST in
onnxruntime: JSON (-o), a table, and a plot where matplotlib is installed. What the file holds of other shares, seeds
and stages stays in it, so that they may be measured in several runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxsim

import onnxprune
from onnxprune import RunOptions
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.evaluate import predict
from onnxprune.evaluating.metrics import find_metric
from onnxprune.evaluating.sources import ImageOptions, as_dataset
from onnxprune.graph.model import open_model
from onnxprune.labels import analyse
from onnxprune.labels.units import find_units
from onnxprune.normalising.normalise import normalise
from onnxprune.scoring.cost import Cost
from onnxprune.training.client import choose_augmentation

PEER = Path(__file__).with_name("peer_torch_pruning.py")


def measure(path: Path, test: Dataset) -> tuple[float, int]:
    """Top-1 on the test data, and MACs."""
    model = normalise(open_model(path))
    units = find_units(analyse(model))
    inputs = {model.graph.inputs[0].name or "": next(iter(test.inputs.values()))}
    outputs = predict(model, Dataset(inputs, test.labels))
    return find_metric("top1", test).compute(outputs, test.labels, []), Cost(units).macs(np.ones(units.count, bool))


def arrays(data: Dataset) -> dict[str, Any]:
    """What `onnxprune.run` takes."""
    return data.inputs if data.labels is None else {**data.inputs, "labels": data.labels}


def by_onnxsim(source: str, share: float, out: Path) -> bool:
    """onnxsim's structured pruning by L2 at the lowest sparsity that leaves this share of the MACs; whether it can."""
    model, _ = onnxsim.simplify(onnx.load(source))
    whole, low, high, reached = macs_of(Path(source)), 0.0, 0.95, False
    for _ in range(8):
        middle = (low + high) / 2
        onnx.save(onnxsim.apply_structured_pruning(model, sparsity=middle), out)
        if macs_of(out) <= share * whole:
            high, reached = middle, True
        else:
            low = middle
    onnx.save(onnxsim.apply_structured_pruning(model, sparsity=high), out)
    return reached


def macs_of(path: Path) -> int:
    units = find_units(analyse(normalise(open_model(path))))
    return Cost(units).macs(np.ones(units.count, bool))


def compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All cuts of both tools."""
    model = normalise(open_model(given.model))
    train, test = (as_dataset(source, model, ImageOptions()) for source in (given.train, given.test))
    uncut, whole = measure(Path(given.model), test)
    print(f"uncut: {uncut:.2f} on {len(test)} test images")
    augmentation = choose_augmentation(model, train, None) if given.epochs else {}
    np.save(folder / "images.npy", next(iter(train.inputs.values())))
    np.save(folder / "labels.npy", train.labels if train.labels is not None else np.zeros(0))
    result = {"model": Path(given.model).name, "uncut": uncut, "test": len(test), "samples": given.samples}
    rows: list[dict[str, Any]] = []

    def note(share: float, seed: int, name: str, path: Path) -> None:
        accuracy, macs = measure(path, test)
        rows.append({"macs": share, "name": name, "seed": seed, "top1": accuracy, "reached": macs / whole})
        print(f"{share:.2f} {name}: {accuracy:.2f} at {macs / whole:.3f}", flush=True)

    for share in given.macs:
        for seed in given.seeds:
            drawn = np.random.default_rng(seed).choice(len(train), min(given.samples, len(train)), replace=False)
            few, out = train.take(np.sort(drawn)), folder / f"{share}-{seed}"
            np.save(folder / "calibration.npy", next(iter(few.inputs.values())))
            for name, data, epochs in [("onnxprune", few, 0)] + [("onnxprune, tuned", train, given.epochs)] * bool(
                given.epochs
            ):
                options = RunOptions(
                    target_macs=share, epochs=epochs, seed=seed, round_to=1, bench_seconds=0.1,
                    criterion=given.criterion, threads=given.threads, lr=given.lr, trainer=given.trainer,
                    scope=given.scope,
                )  # fmt: skip
                path = out.with_name(f"{out.name}{epochs}.onnx")
                held = None if epochs else arrays(few)  # all of the few are for calibration
                onnxprune.run(given.model, arrays(data), output=path, eval_data=held, options=options)
                note(share, seed, name, path)
            if seed == given.seeds[0]:
                path = out.with_suffix(".onnxsim.onnx")
                if by_onnxsim(given.model, share, path):
                    note(share, 0, "onnxsim, structured L2", path)
                else:
                    print(f"{share:.2f} is out of reach for onnxsim")
            if given.peer_python:
                job = {
                    "model": given.model, "share": share, "seed": seed, "out": str(out), "epochs": given.epochs,
                    "lr": given.peer_lr, "batch": RunOptions().batch, "threads": given.threads or 2,
                    "calibration": str(folder / "calibration.npy"), "images": str(folder / "images.npy"),
                    "labels": str(folder / "labels.npy"), "flip": augmentation.get("flip", False),
                    "shift": augmentation.get("shift", 0), "device": given.peer_device,
                }  # fmt: skip
                done = subprocess.run([given.peer_python, str(PEER), json.dumps(job)], capture_output=True, text=True)
                if done.returncode:
                    print(f"Torch-Pruning failed: {done.stderr.strip().splitlines()[-1:]}")
                for stage in ("nothing", "batch-norm", "tuned"):
                    if (path := folder / f"{out.name}.{stage}.onnx").exists():
                        note(share, seed, f"Torch-Pruning, {stage}", path)
    return {**result, "rows": rows}


def add(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """What was found, beside what a file holds of other shares, seeds and stages of the same comparison."""
    before = json.loads(path.read_text()) if path.exists() else result
    if any(before[key] != result[key] for key in ("model", "uncut", "test", "samples")):
        raise SystemExit(f"{path} holds another comparison: choose another file")
    rows = {(row["macs"], row["name"], row["seed"]): row for row in before["rows"] + result["rows"]}
    order = sorted(rows, key=lambda key: (key[0], key[1].lower(), key[2]))
    return {**result, "rows": [rows[key] for key in order]}


def by_cell(result: dict[str, Any], figure: str) -> dict[tuple[str, float], list[float]]:
    """A figure of every seed, by name and share."""
    cells: dict[tuple[str, float], list[float]] = defaultdict(list)
    for row in result["rows"]:
        cells[row["name"], row["macs"]].append(row[figure])
    return cells


def table(result: dict[str, Any]) -> str:
    """Mean and spread over the seeds, a row for each tool and stage."""
    shares, cells = sorted({row["macs"] for row in result["rows"]}, reverse=True), by_cell(result, "top1")
    lines = [f"| {result['model']}, uncut {result['uncut']:.2f} | " + " | ".join(f"{s:.2f}" for s in shares) + " |"]
    lines.append("|---" * (len(shares) + 1) + "|")
    for name in dict.fromkeys(name for name, _ in cells):
        said = [f"{np.mean(v):.1f} ± {np.std(v):.1f}" if (v := cells.get((name, s))) else "" for s in shares]
        lines.append(f"| {name} | " + " | ".join(said) + " |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Accuracy against MACs."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib isn't installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    axes.axhline(result["uncut"], color="gray", linestyle=":", label="uncut")
    cells, reached = by_cell(result, "top1"), by_cell(result, "reached")
    for name in dict.fromkeys(name for name, _ in cells):
        keys = [key for key in cells if key[0] == name]
        means, spread = ([f(cells[key]) for key in keys] for f in (np.mean, np.std))
        axes.errorbar([np.mean(reached[key]) for key in keys], means, spread, marker="o", capsize=3, label=name)
    axes.set(xlabel="share of the MACs left", ylabel="top-1 on test images, %", title=result["model"])
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--peer-python")
    parser.add_argument("--macs", type=float, nargs="+", default=[1 / 1.3, 1 / 1.5, 1 / 2.1, 1 / 2.6, 1 / 4])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--peer-lr", type=float, default=1e-3)
    parser.add_argument("--peer-device", default="cpu")
    parser.add_argument("--trainer", default="auto")
    parser.add_argument("--criterion", default="l2")
    parser.add_argument("--scope", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path, default=Path("accuracy.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        result = add(compare(given, Path(scratch)), given.output)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    given.output.with_suffix(".md").write_text(table(result) + "\n")
    plot(result, given.output.with_suffix(".png"))
    print(table(result))


if __name__ == "__main__":
    main()
