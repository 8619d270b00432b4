"""Fine-tunes every model of a folder for ten steps: `python tools/sweep_training.py FOLDER [NAME …] [-o FILE]`.

For each model, in a process of its own: `prune --ratio 0.5`; the graph that trains, with statistics kept, against the
pruned model; ten steps of AdamW on fixed random inputs with the uncut model as teacher; the pruned model with the new
weights in onnxruntime. Writes a JSON row for each (operators that were lowered, largest difference, loss before and
after, or the reason why not), and prints a summary. Topologies without weights are filled as `sweep.py` does it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SAMPLES, STEPS, RATE = 4, 10, 1e-4
EQUAL = 1e-4  # largest relative difference that counts as none


def tune_one(path: Path) -> dict[str, Any]:
    """Prunes and tunes one model. Raises whatever goes wrong."""
    import onnx_ir as ir
    from sweep import filled

    from onnxprune.api import prune
    from onnxprune.evaluating.data import Dataset, fixed_batch, random_inputs
    from onnxprune.evaluating.evaluate import predict, relative_difference, run_model
    from onnxprune.graph.model import open_model
    from onnxprune.normalising.normalise import normalise
    from onnxprune.training import TrainingOptions, fine_tune
    from onnxprune.training.forward import evaluation_graph
    from onnxprune.training.losses import plan_loss
    from onnxprune.training.lowering import LOWERINGS

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = filled(path, folder)
        out, baseline = folder / "pruned.onnx", folder / "baseline.onnx"
        prune(source, out, 0.5, baseline=baseline)
        student, teacher = normalise(open_model(out)), open_model(baseline)
        lowered = sorted({node.op_type for node in student.graph if node.op_type in LOWERINGS})
        samples = fixed_batch(student) or SAMPLES
        data = Dataset(random_inputs(student, 0, batch=None if fixed_batch(student) else SAMPLES), None)
        loss = plan_loss(student, data)
        graph, outputs = evaluation_graph(student, loss, {name: array.shape for name, array in data.inputs.items()})
        part = ir.convenience.extract(student.graph, student.graph.inputs, outputs)
        expected = run_model(ir.Model(part, ir_version=student.ir_version), data.inputs)
        found = run_model(graph, data.inputs)
        difference = max(relative_difference(a, b) for a, b in zip(expected, found, strict=True))
        losses: list[float] = []
        start = time.perf_counter()
        options = TrainingOptions(epochs=STEPS, lr=RATE, batch=samples, weight_decay=0.0, threads=1)

        def listen(event: dict[str, Any]) -> None:
            if event["event"] == "step":
                losses.append(event["loss"])

        fine_tune(student, teacher, data, folder / "job", options, progress=listen)
        predict(student, data)
        return {
            "seconds": time.perf_counter() - start, "lowered": lowered, "difference": difference,
            "losses": [losses[0], losses[-1]],
        }  # fmt: skip


def run_child(path: Path, limit: float) -> dict[str, Any]:
    """One model in a process of its own, with a time limit."""
    from sweep import answer_of

    return answer_of([sys.executable, __file__, str(path.parent), path.stem, "--one"], path, limit)


def passed(row: dict[str, Any]) -> bool:
    return "error" not in row and row["difference"] <= EQUAL and row["losses"][1] < row["losses"][0]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A page with a row for each model."""
    lines = [
        "# Ten steps of training on every kind of model", "",
        "Written by `tools/sweep_training.py`: each model cut at 0.5, the uncut one as teacher, ten steps of AdamW on",
        "four fixed random inputs (the model's own batch where it insists on one). The difference is that of the",
        "training graph, with statistics kept, to the outputs; the trained weights then ran in onnxruntime.", "",
        f"{sum(map(passed, rows))} of {len(rows)} train.", "",
        "| model | difference | loss before | after | lowered, or what failed |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda each: str(each["name"])):
        if "error" in row:
            lines.append(f"| {row['name']} | | | | {row['error'].split(chr(10))[0][:160]} |")
        else:
            before, after = row["losses"]
            lowered = ", ".join(row["lowered"])
            lines.append(f"| {row['name']} | {row['difference']:.0e} | {before:.4g} | {after:.4g} | {lowered} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a model")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=Path("training.json"))
    parser.add_argument("--table", type=Path, help="also write a page of Markdown")
    parser.add_argument("--merge", type=Path, nargs="*", default=[], help="rows that earlier runs wrote")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(tune_one(given.folder / f"{given.names[0]}.onnx")))
        return
    rows: list[dict[str, Any]] = []
    fresh = given.names or sorted(path.stem for path in given.folder.glob("*.onnx"))
    for earlier in given.merge:
        rows += [row for row in json.loads(earlier.read_text()) if row["name"] not in fresh]
    for name in fresh:
        rows.append(row := run_child(given.folder / f"{name}.onnx", given.limit))
        if "error" in row:
            print(f"{name:42s} FAILED {row['error']}", flush=True)
        else:
            said = f"loss {row['losses'][0]:.4f} -> {row['losses'][1]:.4f}  lowered: {', '.join(row['lowered'])}"
            print(f"{name:42s} {row['seconds']:6.1f} s  {row['difference']:.1e}  {said}", flush=True)
        given.output.write_text(json.dumps(rows, indent=1) + "\n")
    if given.table:
        given.table.write_text(markdown(rows))
    print(f"{sum(map(passed, rows))} of {len(rows)} train")


if __name__ == "__main__":
    main()
