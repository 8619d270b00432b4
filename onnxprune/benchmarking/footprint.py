"""How much memory a model takes: run by the benchmark, `python -m onnxprune.benchmarking.footprint`.

A process of its own, and not one that multiprocessing spawns: that would import the caller's main script again.
"""

from __future__ import annotations

import json
import sys

import psutil

from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import run_session, session_options
from onnxprune.graph.model import open_model, open_session


def main() -> None:
    """Prints the bytes that loading and running the model once adds to this process."""
    path, provider, threads, batch, seed, shapes = sys.argv[1:7]
    inputs = random_inputs(open_model(path), int(seed), int(batch), shapes=json.loads(shapes))
    process = psutil.Process()  # type: ignore[no-untyped-call,unused-ignore]
    before = process.memory_info().rss
    session = open_session(path, session_options(int(threads) or None), [provider])
    run_session(session, inputs)
    print(max(0, process.memory_info().rss - before))


if __name__ == "__main__":
    main()
