#!/usr/bin/env python3
"""compare_tuning.py [--models A,B] [--macs 0.6] [--epochs 0,2,20] [--minutes 5] [--peer COMMAND] [--out FILE]

Does fine-tuning without labels help? Runs `onnxprune run` by its defaults on real models with samples, to a share of
the MACs and for each number of epochs, and measures on the test samples, which no run saw: the share of the outputs'
spread that is lost, `sum |y - x|^2 / sum |x - mean x|^2`, x the uncut one's. With `--peer`, by another version too.
MODELS are names in a folder with NAME.onnx, NAME_train.npz and NAME_test.npz (ONNXPRUNE_SHARED/real), by default all
whose every input has a row for each sample.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import OnnxPruneError
from onnxprune.evaluating.data import Dataset, check_data, model_inputs
from onnxprune.evaluating.evaluate import predict
from onnxprune.evaluating.metrics import fidelity
from onnxprune.graph.model import open_model

SHARED = Path(os.environ.get("ONNXPRUNE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
OURS = f"{sys.executable} -m onnxprune"


def samples(model: Any, path: Path) -> Dataset:
    """The arrays of a file under the model's names and in its types. Raises `OnnxPruneError` where they don't fit."""
    with np.load(path) as file:
        found: dict[str, NDArray[Any]] = dict(file)
    values = model_inputs(model)
    if not {value.name for value in values} >= set(found):
        found = dict(zip([value.name or "" for value in values], found.values(), strict=False))
    kinds = {value.name: value.dtype.numpy() for value in values if value.dtype is not None}
    return check_data({name: array.astype(kinds[name]) for name, array in found.items()}, model)


def measure(name: str, command: str, macs: float, epochs: int, minutes: float, folder: Path) -> dict[str, Any]:
    """One run, and what it lost on the test samples."""
    source = SHARED / "real" / f"{name}.onnx"
    model = open_model(source)
    train, test = (samples(model, SHARED / "real" / f"{name}_{part}.npz") for part in ("train", "test"))
    np.savez(folder / "train.npz", **train.inputs)  # type: ignore[arg-type]
    out = folder / "out.onnx"
    asked = ["--data", folder / "train.npz", "-o", out, "--run-dir", folder / "run", "--target-macs", macs]
    asked += ["--epochs", epochs] + (["--minutes", minutes] if epochs > 2 else [])
    asked += ["--force"] if command == OURS else []
    started = time.monotonic()
    done = subprocess.run(
        [*shlex.split(command), "run", str(source), *map(str, asked)], capture_output=True, text=True, check=False
    )
    row = {"model": name, "command": command, "macs": macs, "epochs": epochs, "status": done.returncode}
    row["seconds"] = round(time.monotonic() - started)
    if not out.exists():
        return {**row, "said": done.stderr.strip().splitlines()[-1:]}
    uncut, cut = (predict(open_model(path), test) for path in (source, out))
    return {**row, "lost": round(1 - fidelity(cut, uncut), 4)}


def main() -> None:
    """Measures all and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="")
    parser.add_argument("--macs", type=float, default=0.6)
    parser.add_argument("--epochs", default="0,2,20")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--peer", help="the command of another version")
    parser.add_argument("--out", type=Path, default=Path("tuning.json"))
    given = parser.parse_args()
    names = given.models.split(",") if given.models else sorted(p.stem for p in (SHARED / "real").glob("*.onnx"))
    rows = []
    for name in names:
        for command in [OURS, *([given.peer] if given.peer else [])]:
            for epochs in map(int, given.epochs.split(",")):
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        row = measure(name, command, given.macs, epochs, given.minutes, Path(folder))
                    except OnnxPruneError as error:
                        print(f"{name}: left out: {error}", flush=True)
                        break
                rows.append(row)
                print(row, flush=True)
                given.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
