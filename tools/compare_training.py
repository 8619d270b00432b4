"""Training throughput beside PyTorch: the same file, batch, loss, optimizer and threads, in turns.

    python tools/compare_training.py MODEL=CHANNELS,HEIGHT,WIDTH … --peer-python PYTHON [--threads 1 2] [-o FILE]

PYTHON is an interpreter with torch and onnx2torch. Each turn times steps of 64 random images with AdamW and
cross-entropy, batch normalisation on its own statistics or on those of the batch (--batch-statistics): onnxprune with
ONNX Runtime training and with gradients as ONNX nodes, or with other --trainers, and PyTorch on --peer-device. What is
written, as JSON and as a table, are images per second as shares of PyTorch's in the same turn, the median over turns
and their range.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.training import Trainer

BATCH, STEPS, SKIPPED = 64, 14, 4
NAMES: dict[Trainer, str] = {
    "ort": "ONNX Runtime training",
    "graph": "gradients as nodes",
    "cuda": "gradients as nodes on a GPU",
}

PEER = """
import sys, time
import numpy as np, torch
from onnx2torch import convert
path, threads, steps, batch, statistics, device, *shape = sys.argv[1:]
torch.set_num_threads(int(threads))
model = convert(path).train().to(device)
for module in model.modules():
    if statistics == "kept" and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        module.eval()
rng = np.random.default_rng(0)
x = torch.tensor(rng.standard_normal((int(batch), *map(int, shape))), dtype=torch.float32, device=device)
y = torch.tensor(rng.integers(0, 10, int(batch)), device=device)
optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=1e-4)
times = []
for _ in range(int(steps)):
    start = time.perf_counter()
    loss = torch.nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    loss.item()
    times.append(time.perf_counter() - start)
print(np.median(times[4:]))
"""


def ours(path: str, trainer: Trainer, threads: int, shape: list[int], batch_statistics: bool) -> float:
    """Seconds of a step."""
    from onnxprune.evaluating.data import Dataset
    from onnxprune.graph.model import open_model
    from onnxprune.normalising.normalise import normalise
    from onnxprune.training import Loss, TrainingOptions, fine_tune

    model = normalise(open_model(path))
    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCH, *shape)).astype(np.float32)
    data = Dataset({model.graph.inputs[0].name or "": images}, rng.integers(0, 10, BATCH))
    moments: list[float] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            moments.append(time.perf_counter())

    options = TrainingOptions(
        trainer, epochs=STEPS, lr=1e-4, threads=threads, loss=Loss(distillation=0.0), batch_statistics=batch_statistics
    )
    with tempfile.TemporaryDirectory() as folder:
        fine_tune(model.clone(), model, data, Path(folder) / "job", options, progress=listen)
    return float(np.median(np.diff(moments)[SKIPPED:]))


def theirs(python: str, path: str, threads: int, shape: list[int], batch_statistics: bool, device: str) -> float:
    """Seconds of a step in PyTorch."""
    statistics = "batch" if batch_statistics else "kept"
    words = [python, "-c", PEER, path, str(threads), str(STEPS), str(BATCH), statistics, device, *map(str, shape)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"PyTorch failed on {path}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL=C,H,W")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--trainers", nargs="+", choices=NAMES, default=["ort", "graph"])
    parser.add_argument("--peer-device", default="cpu")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--batch-statistics", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("throughput.json"))
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    lines = [f"| model | threads | {' | '.join(NAMES[each] for each in given.trainers)} |"]
    lines.append("|---|---" + "|---" * len(given.trainers) + "|")
    for entry in given.models:
        path, _, sizes = entry.partition("=")
        shape = [int(size) for size in sizes.split(",")]
        for threads in given.threads:
            shares: dict[Trainer, list[float]] = {trainer: [] for trainer in given.trainers}
            for _ in range(given.turns):
                peer = theirs(given.peer_python, path, threads, shape, given.batch_statistics, given.peer_device)
                for trainer, found in shares.items():
                    found.append(peer / ours(path, trainer, threads, shape, given.batch_statistics))
            rows.append({"model": Path(path).name, "threads": threads} | shares)
            said = [f"{np.median(v):.2f}x ({min(v):.2f} to {max(v):.2f})" for v in shares.values()]
            lines.append(f"| {Path(path).name} | {threads} | {' | '.join(said)} |")
            print(lines[-1], flush=True)
            given.output.write_text(json.dumps(rows, indent=1) + "\n")
            given.output.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
