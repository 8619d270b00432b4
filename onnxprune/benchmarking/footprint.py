"""How much memory a model takes: run by the benchmark, `python -m onnxprune.benchmarking.footprint`.

A process of its own, and not one that multiprocessing spawns: that would import the caller's main script again. It
loads nothing but the runtime, so that it starts at once.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime
import psutil


def main() -> None:
    """Prints the bytes that loading a model and running it once, on inputs in a .npz, adds to this process."""
    path, provider, threads, inputs = sys.argv[1:5]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if int(threads):
        options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
    with np.load(inputs) as arrays:
        batch = dict(arrays)
    process = psutil.Process()  # type: ignore[no-untyped-call,unused-ignore]
    before = process.memory_info().rss
    session = onnxruntime.InferenceSession(path, options, [provider])
    session.run(None, {value.name: batch[value.name] for value in session.get_inputs() if value.name in batch})
    print(max(0, process.memory_info().rss - before))


if __name__ == "__main__":
    main()
