"""How near `--target-latency` comes.

    python tools/reach_latency.py MODEL[=DATA] … [--targets 0.7 0.5] [--ep NAME] [-o FILE]

For each model and share of the uncut time: the share that a benchmark of its own measures then, with its interval,
the share of the MACs left, and that of MACs at ragged widths (`--target-macs` at that share, `--round-to 1`) in time.
Nothing is trained. With --quality the A/A test too: how often a model and itself differ, and a copy that
sleeps for a tenth longer doesn't. Writes JSON and a table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from onnxprune.benchmarking import bench as benchmarks
from onnxprune.benchmarking.bench import bench_models
from onnxprune.benchmarking.interleave import interleave
from onnxprune.evaluating.data import random_inputs
from onnxprune.graph.model import open_model, open_session
from onnxprune.graph.threads import session_options

TRIALS = 40


def run(model: str, data: str, out: Path, threads: int, *words: str) -> dict[str, Any]:
    """What `onnxprune run` reports."""
    command = [sys.executable, "-m", "onnxprune", "run", model, "-o", str(out), "--epochs", "0", "--json"]
    given = ["--data", data] if data else []
    done = subprocess.run(
        [*command, *given, "--threads", str(threads), *words], capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 5):
        raise SystemExit(f"{model}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def reach(model: str, data: str, target: float, threads: int, ep: str) -> dict[str, Any]:
    """The figures of one model at one target."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        by_time, ragged = folder / "time.onnx", folder / "ragged.onnx"
        report = run(model, data, by_time, threads, "--target-latency", str(target), "--ep", ep)
        macs = report["pruned"]["macs"] / report["baseline"]["macs"]
        if macs < 1:
            run(model, data, ragged, threads, "--target-macs", f"{macs:.4f}", "--round-to", "1", "--ep", ep)
        paths = [Path(model), by_time, *([ragged] if macs < 1 else [])]
        found = [result.against_first for result in bench_models(paths, [ep], threads=threads, seconds=6)][1:]
        shares = [{"share": 1 / c.speedup, "low": 1 / c.high, "high": 1 / c.low} for c in found]
        return {"model": Path(model).name, "asked": target, "macs": macs, "time": shares[0], "ragged": shares[-1]}


def quality(model: str, threads: int) -> dict[str, float]:
    """The share of A/A trials that find no difference, and of those with a tenth more that find one."""
    feeds = random_inputs(open_model(model), 0, 1)

    class Slower:
        def __init__(self) -> None:
            self.session = open_session(model, session_options(threads), ["CPUExecutionProvider"])

        def run(self, names: Any, given: Any) -> Any:
            start = time.perf_counter()
            result = self.session.run(names, given)
            until = start + 1.1 * (time.perf_counter() - start)
            while time.perf_counter() < until:
                pass
            return result

    def plain() -> Any:
        return open_session(model, session_options(threads), ["CPUExecutionProvider"])

    import numpy as np

    counts = {"same": 0, "slower": 0}
    for _ in range(TRIALS):
        for kind, other in (("same", plain), ("slower", Slower)):
            rows, _ = interleave([plain, other], feeds, 1.0)
            compared = benchmarks.compare(np.array(rows[0]), np.array(rows[1]))
            counts[kind] += not compared.differs if kind == "same" else compared.high < 1
    return {kind: count / TRIALS for kind, count in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL[=DATA]")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.7, 0.5])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ep", default="cpu")
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("latency.json"))
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    lines = ["| model | time asked | measured | MACs left | time at these MACs, ragged |", "|---|---|---|---|---|"]
    for entry in given.models:
        model, _, data = entry.partition("=")
        for target in given.targets:
            rows.append(row := reach(model, data, target, given.threads, given.ep))
            said = [f"{s['share']:.2f} ({s['low']:.2f} to {s['high']:.2f})" for s in (row["time"], row["ragged"])]
            lines.append(f"| {row['model']} | {target:.2f} | {said[0]} | {row['macs']:.2f} | {said[1]} |")
            print(lines[-1], flush=True)
        if given.quality:
            rows.append({"model": Path(model).name, **quality(model, given.threads)})
            print(f"A/A: {rows[-1]}", flush=True)
    given.output.write_text(json.dumps(rows, indent=1) + "\n")
    given.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
