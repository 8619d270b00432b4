"""Prunes every model of a folder and checks each result: `python tools/sweep.py FOLDER [-o sweep.json]`.

For each model, in a process of its own: `prune --ratio`, the pruned model in onnxruntime, and the mask oracle on three
seeds of signed inputs. Writes a JSON row for each (time, parameters, MACs, exact or not, largest difference, what locks
the rest) and prints a summary. A folder with a `zoo.py` holds topologies without weights, which it fills by a seed; an
`index.json` beside it gives the input shapes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SEEDS = (0, 1, 2)
HALF = 0.5  # share of the parameters that a sweep wants gone
INLINE = 2**30  # bytes; larger filled models keep their weights beside the file


def filled(path: Path, folder: Path) -> Path:
    """The model with weights: itself, or a copy that the folder's zoo.py has filled."""
    import onnx

    proto = onnx.load(str(path), load_external_data=False)
    if not any(entry.key == "zoo.stripped" for entry in proto.metadata_props):
        return path
    spec = importlib.util.spec_from_file_location("zoo", path.parent / "zoo.py")
    assert spec is not None and spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    zoo.fill_weights(proto, 0)
    target = folder / path.name
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if size > INLINE:
        onnx.save_model(proto, str(target), save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save_model(proto, str(target))
    return target


def sweep_one(path: Path, ratio: float) -> dict[str, Any]:
    """Prunes one model and checks it. Raises whatever goes wrong."""
    import resource

    from onnxprune.api import inspect, prune, verify

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = filled(path, folder)
        out, plan, baseline = (folder / each for each in ("pruned.onnx", "plan.json", "baseline.onnx"))
        start = time.perf_counter()
        done = prune(source, out, ratio, plan=plan, baseline=baseline)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        oracle = verify(baseline, out, plan, SEEDS)
        row = {
            "seconds": round(seconds, 2), "peak_bytes": peak, "params": done.params, "macs": done.macs,
            "exact": done.plan.exact, "comparable": not oracle.open_nodes,
            "difference": oracle.difference, "tolerance": oracle.tolerance,
            "inexact_nodes": len(done.plan.inexact_nodes), "open_nodes": len(oracle.open_nodes),
        }  # fmt: skip
        if done.params[1] > HALF * done.params[0]:
            found = inspect(baseline)
            row["reachable"] = found.reachable_params
            row["locks"] = Counter(lock["reason"] for lock in found.locks).most_common(4)
        return row


def run_child(path: Path, ratio: float, limit: float) -> dict[str, Any]:
    """One model in a process of its own, with a time limit."""
    return answer_of(
        [sys.executable, __file__, str(path.parent), "--one", path.name, "--ratio", str(ratio)], path, limit
    )


def answer_of(command: list[str], path: Path, limit: float) -> dict[str, Any]:
    """The JSON in the last line that a command prints about a model, or an error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"name": path.stem, "error": f"more than {limit:.0f} s"}
    lines = (done.stdout.strip() or done.stderr.strip() or f"exit status {done.returncode}").splitlines()
    try:
        return {"name": path.stem, **json.loads(lines[-1])}
    except ValueError:
        return {"name": path.stem, "error": lines[-1][:500]}


def verdict(row: dict[str, Any]) -> str:
    """What a row amounts to, in a word or two."""
    if "error" in row:
        return "failed"
    if row["comparable"] and not row["difference"] <= row["tolerance"]:
        return "differs"
    return "half" if row["params"][1] <= HALF * row["params"][0] else "less than half"


def line_of(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    if "error" in row:
        return f"{row['name']:42s} FAILED {row['error']}"
    left = [100 * row[name][1] / max(row[name][0], 1) for name in ("params", "macs")]
    kind = "exact" if row["exact"] else "means" if row["comparable"] else "inexact"
    tail = "; ".join(f"{count}x {reason}" for reason, count in row.get("locks", []))
    return (
        f"{row['name']:42s} {row['seconds']:7.1f} s  params {left[0]:5.1f} %  MACs {left[1]:5.1f} %  {kind:7s} "
        f"{row['difference']:.1e}  {verdict(row)} {tail}"
    )


def markdown(rows: list[dict[str, Any]], peer: Path | None) -> str:
    """A table of all rows under a summary, beside a peer's results on the same models where its file is given."""
    words = Counter(map(verdict, rows))
    done = [row for row in rows if "error" not in row]
    exact = [row for row in done if row["exact"]]
    means = [row for row in done if row["comparable"] and not row["exact"]]
    lines = [
        "# Every model of a folder, half of its units removed",
        "",
        "Written by `tools/sweep.py`. `exact` cuts equal the masked model; `means` equal it with means taken over what",
        "is left; `inexact` can't be compared. The difference is the largest of three seeds, relative to the outputs.",
        "",
        f"{len(rows)} models: {len(done)} pruned and run, {words['half']} to at most half of their parameters; "
        f"{len(exact)} exact (largest difference {max((r['difference'] for r in exact), default=0):.0e}), "
        f"{len(means)} compared over means ({max((r['difference'] for r in means), default=0):.0e}).",
        "",
    ]
    if peer is not None:
        lines += [*beside(rows, json.loads(peer.read_text())), ""]
    lines += [
        "| model | seconds | parameters left | MACs left | kind | difference | what holds the rest |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda each: str(each["name"])):
        if "error" in row:
            lines.append(f"| {row['name']} | | | | failed | | {row['error'][:150]} |")
            continue
        left = [f"{100 * row[name][1] / max(row[name][0], 1):.1f} %" for name in ("params", "macs")]
        kind = "exact" if row["exact"] else "means" if row["comparable"] else "inexact"
        why = "; ".join(reason for reason, _ in row.get("locks", [])[:2])
        lines.append(
            f"| {row['name']} | {row['seconds']} | {' | '.join(left)} | {kind} | {row['difference']:.0e} | {why} |"
        )
    return "\n".join(lines) + "\n"


def beside(rows: list[dict[str, Any]], peer: dict[str, Any]) -> list[str]:
    """The same models by Torch-Pruning: how many were pruned, ran, lost their share and ran in onnxruntime."""
    own = {row["name"]: row for row in rows}
    theirs = [row for row in peer["rows"] if row["mode"] == "plain" and row["name"] in own]
    ours = [own[row["name"]] for row in theirs]
    return [
        f"On the {len(theirs)} models that {peer['tool'].split(',')[0]} was run on as well:",
        "",
        "| | pruned | runs in onnxruntime | at least 40 % of the parameters gone | all |",
        "|---|---|---|---|---|",
        "| Torch-Pruning | {} | {} | {} | {} |".format(
            *(sum(bool(row.get(column)) for row in theirs) for column in "adc"),
            sum(all(row.get(column) for column in "abcd") for row in theirs),
        ),
        "| onnxprune | {0} | {0} | {1} | {1} |".format(
            sum("error" not in row for row in ours),
            sum("error" not in row and row["params"][1] <= 0.6 * row["params"][0] for row in ours),
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("sweep.json"))
    parser.add_argument("--peer", type=Path, help="JSON of Torch-Pruning's results on the same models")
    parser.add_argument("--table", type=Path, help="write a Markdown table too")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds a model may take")
    parser.add_argument("--only", nargs="*", default=[], help="parts of names; other rows of an earlier table stay")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        try:
            print(json.dumps(sweep_one(given.folder / given.one, given.ratio)))
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}))
        return
    paths = sorted(given.folder.resolve().glob("*.onnx"), key=lambda path: path.stat().st_size)
    paths = [path for path in paths if not given.only or any(part in path.name for part in given.only)]
    names = {path.stem for path in paths}
    before = json.loads(given.output.read_text()) if given.only and given.output.exists() else []
    rows: list[dict[str, Any]] = [row for row in before if row["name"] not in names]

    def work(path: Path) -> None:
        row = run_child(path, given.ratio, given.limit)
        rows.append(row)
        print(line_of(row), flush=True)
        given.output.write_text(json.dumps(sorted(rows, key=lambda each: str(each["name"])), indent=1) + "\n")

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(work, paths))
    if given.table:
        given.table.write_text(markdown(rows, given.peer))
    print(f"{len(rows)} models: {dict(Counter(map(verdict, rows)))}")


if __name__ == "__main__":
    main()
