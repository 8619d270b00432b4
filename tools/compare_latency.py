"""Time at equal MACs: onnxprune's choice of widths, ragged widths, and Torch-Pruning's exported model.

    python tools/compare_latency.py MODEL[=SIZE] … [--peer-python PYTHON] [--macs 0.5] [--threads 1] [-o FILE]
        [--ep cuda --batch 32]

MODEL may be a topology without weights from a folder that has a `zoo.py` to fill it; with a SIZE its images are as high
and wide, with --batch there are so many. On other execution providers than the CPU's, widths are rounded to the step
that the probe finds, and inputs and outputs stay on the device. Onnxprune's cut is that of `--target-macs`; "by time"
groups are weighed by the time that the probe says they cost, as for `--target-latency`; "ragged" widths aren't rounded.
All cuts leave the same share of the MACs, by L2; they and the uncut model are timed in one process, in turns. What is
written, as JSON and as a table, is how many times as fast as the uncut model each is, with its 95 % interval, and the
MACs that are really left: at the same MACs a model should be as many times as fast as its MACs are fewer. Nothing is
trained.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from sweep import filled

from onnxprune.benchmarking.bench import Runtime, bench_models, find_providers
from onnxprune.benchmarking.probe import CPU, Probe, probe
from onnxprune.choosing.select import Rounding, tau_for
from onnxprune.cutting.cut import cut
from onnxprune.evaluating.data import random_inputs
from onnxprune.exporting.finalise import finalise
from onnxprune.graph.model import open_model, save_model
from onnxprune.labels import analyse
from onnxprune.labels.units import chosen_units, find_units
from onnxprune.normalising.normalise import normalise
from onnxprune.scoring.cost import Cost
from onnxprune.scoring.score import normalise_scores, origin_of, score_units

PEER = Path(__file__).with_name("peer_torch_pruning.py")


def macs_of(path: Path) -> int:
    units = find_units(analyse(normalise(open_model(path))))
    return Cost(units).macs(np.ones(units.count, bool))


def ours(source: Path, share: float, out: Path, rounding: Rounding, target: Probe | None = None) -> None:
    """The cut that `run --target-macs` makes before it repairs; with a target as `--target-latency` weighs it."""
    units = chosen_units(normalise(open_model(source)), "auto", (), ())
    scores = normalise_scores(units, score_units(units, "l2", 0), "gradual", origin_of(units, target))
    costs = Cost(units)
    limit = share * costs.macs(np.ones(units.count, bool))
    chosen = tau_for(units, scores, rounding, lambda alive: costs.macs(alive) <= limit)
    if chosen is None:
        raise SystemExit(f"{source}: {share} of the MACs is out of reach")
    save_model(finalise(cut(units, chosen[1])[0]), out)


def theirs(python: str, source: Path, share: float, folder: Path) -> Path | None:
    """Torch-Pruning's model, with the input called as in the source; None where it fails."""
    ((name, array),) = random_inputs(open_model(source), 0, 2).items()
    np.save(folder / "calibration.npy", array)
    out = folder / "peer"
    job = {"model": str(source), "share": share, "seed": 0, "out": str(out), "epochs": 0, "threads": 1,
           "calibration": str(folder / "calibration.npy")}  # fmt: skip
    done = subprocess.run([python, str(PEER), json.dumps(job)], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"Torch-Pruning failed on {source.name}: {done.stderr.strip().splitlines()[-1:]}")
        return None
    path = Path(f"{out}.nothing.onnx")
    model = onnx.load(path)
    for node in model.graph.node:
        node.input[:] = [name if each == "input" else each for each in node.input]
    model.graph.input[0].name = name
    onnx.save(model, path)
    return path


def resized(path: Path, size: int | None, batch: int | None, folder: Path) -> Path:
    """The model for images of another size, and another number of them."""
    model = onnx.load(path)
    first, *_, height, width = model.graph.input[0].type.tensor_type.shape.dim
    for dim, wanted in ((first, batch), (height, size), (width, size)):
        if wanted:
            dim.dim_value = wanted
    if batch:
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    onnx.save(model, folder / f"{path.stem}_{size}.onnx")
    return folder / f"{path.stem}_{size}.onnx"


def compare(given: argparse.Namespace, entry: str, folder: Path) -> dict[str, Any]:
    """The figures of one model."""
    name, _, size = entry.partition("=")
    model, source = Path(name), filled(Path(name), folder)
    if size or given.batch:
        source = resized(source, int(size) if size else None, given.batch, folder)
    (provider,) = find_providers([given.ep])
    target = probe(provider, given.threads)
    rounding = Rounding() if provider == CPU else Rounding(None, target.steps["conv"])
    paths = {"uncut": source, **{kind: folder / f"{kind}.onnx" for kind in ("onnxprune", "by time", "ragged")}}
    ours(source, given.macs, paths["onnxprune"], rounding)
    ours(source, given.macs, paths["by time"], rounding, target)
    ours(source, given.macs, paths["ragged"], Rounding(1))
    if given.peer_python and (peer := theirs(given.peer_python, source, given.macs, folder)):
        paths["Torch-Pruning"] = peer
    whole = macs_of(source)
    runtime = Runtime(given.threads, bound=provider != CPU)
    found = bench_models(list(paths.values()), [provider], seconds=given.seconds, runtime=runtime)
    row: dict[str, Any] = {name: getattr(given, name) for name in ("threads", "ep", "batch")}
    row |= {"model": model.stem, "size": size}
    for (kind, path), result in zip(paths.items(), found, strict=True):
        compared = result.against_first
        row[kind] = {
            "macs": macs_of(path) / whole,
            "speedup": compared.speedup,
            "low": compared.low,
            "high": compared.high,
        }
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """A row for each model."""
    names = ["onnxprune", "by time", "ragged", "Torch-Pruning"]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        said = [
            f"{c['speedup']:.2f}x ({c['low']:.2f} to {c['high']:.2f}) at {100 * c['macs']:.0f} %"
            if (c := row.get(name))
            else ""
            for name in names
        ]
        lines.append(f"| {row['model']} | " + " | ".join(said) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL[=SIZE]")
    parser.add_argument("--peer-python")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ep", default="cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("-o", "--output", type=Path, default=Path("equal_macs.json"))
    given = parser.parse_args()
    rows = []
    for entry in given.models:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(compare(given, entry, Path(folder)))
        print(table(rows).splitlines()[-1], flush=True)
        given.output.write_text(json.dumps(rows, indent=1) + "\n")
        given.output.with_suffix(".md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
