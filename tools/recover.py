"""Fidelity without labels: cut, repaired, and fine-tuned by distillation alone, from the command line.

    python tools/recover.py MODEL=DATA.npz … [--share 0.6] [--epochs N] [-o FILE]

DATA holds inputs by name (labels are taken out); a fifth of it decides and is measured on. For each model, at this
share of the MACs: the cosine to the uncut outputs, in percent, of what the cut leaves, of what `run --epochs 0` leaves,
and of what `run` leaves. Writes JSON and a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.evaluating.evaluate import predict
from onnxprune.evaluating.metrics import METRICS
from onnxprune.evaluating.sources import load_data
from onnxprune.graph.model import open_model


def command(*words: str) -> dict[str, Any]:
    """What a command of onnxprune says with --json."""
    done = subprocess.run([sys.executable, "-m", "onnxprune", *words, "--json"], capture_output=True, text=True)
    if done.returncode not in (0, 5):
        raise SystemExit(f"{words}: {done.stderr.strip()}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def split(path: Path, folder: Path) -> tuple[Path, Path]:
    """Files with four fifths and one fifth of the samples, without labels."""
    with np.load(path) as arrays:
        inputs = {name: arrays[name] for name in arrays.files if name != "labels"}
    order = np.random.default_rng(0).permutation(len(next(iter(inputs.values()))))
    edge = len(order) // 5
    places = folder / "train.npz", folder / "test.npz"
    for place, rows in zip(places, (order[edge:], order[:edge]), strict=True):
        np.savez(place, **{name: array[np.sort(rows)] for name, array in inputs.items()})
    return places


def recover(model: str, data: str, given: argparse.Namespace) -> dict[str, Any]:
    """The figures for one model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, test = split(Path(data), folder)
        samples = load_data(str(test), open_model(model))
        whole = predict(open_model(model), samples)

        def cosine(path: Path) -> float:
            return METRICS["cosine"].compute(predict(open_model(path), samples), None, whole)

        row: dict[str, Any] = {"model": Path(model).name}
        run = ["run", model, "--data", str(train), "--eval-data", str(test), "--target-macs", str(given.share)]
        for kind, epochs in (
            ("repaired", ["--epochs", "0"]),
            ("tuned", ["--epochs", str(given.epochs)] if given.epochs else []),
        ):
            out = folder / f"{kind}.onnx"
            report = command(*run, *epochs, "-o", str(out))
            row[kind], row["macs"] = cosine(out), report["pruned"]["macs"] / report["baseline"]["macs"]
            row["seconds"] = report["seconds"]
        plan = folder / "repaired.onnxprune" / "plan.json"
        command(
            "apply", str(plan), str(folder / "repaired.onnxprune" / "baseline.onnx"), "-o", str(folder / "cut.onnx")
        )
        row["cut"] = cosine(folder / "cut.onnx")
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="MODEL=DATA.npz")
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("-o", "--output", type=Path, default=Path("recover.json"))
    given = parser.parse_args()
    rows = []
    lines = ["| model | MACs left | cut | repaired | fine-tuned | seconds |", "|---|---|---|---|---|---|"]
    for pair in given.pairs:
        model, _, data = pair.partition("=")
        rows.append(row := recover(model, data, given))
        figures = " | ".join(f"{row[name]:.2f}" for name in ("cut", "repaired", "tuned"))
        lines.append(f"| {row['model']} | {100 * row['macs']:.1f} % | {figures} | {row['seconds']:.0f} |")
        print(lines[-1], flush=True)
        given.output.write_text(json.dumps(rows, indent=1) + "\n")
        given.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
