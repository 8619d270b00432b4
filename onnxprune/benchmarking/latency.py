"""Cuts to a measured time: an estimate of a target's time chooses widths, a real benchmark corrects it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxprune.benchmarking.bench import time_models
from onnxprune.exporting.finalise import finalise
from onnxprune.graph.model import save_model

CORRECTIONS = 5
NEAR = 0.92  # of the time asked: what is faster has given away more than it had to; the middle is aimed at
INSIDE = 0.1  # share of the interval that the next trial keeps from either end
SECONDS = 2.5  # of a benchmark that decides


def time_share(
    uncut: Path,
    model: ir.Model,
    provider: str,
    threads: int | None,
    shapes: Mapping[str, Sequence[int]],
    seconds: float = SECONDS,
) -> float:
    """The median time of a model as a share of the uncut one's, on a provider, on inputs of these shapes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cut.onnx"
        save_model(finalise(model), path)
        _, after = time_models([uncut, path], provider, threads, seconds=seconds, shapes=shapes)
        return 1 / after.speedup


def correct(asked: float, cut_at: Callable[[float], tuple[float, float] | None]) -> tuple[float, float] | None:
    """The threshold of the slowest cut whose measured time is at most `asked`, as a share of the uncut time.

    `cut_at(way)` gives a threshold and the share measured there: the way is 1 to the uncut model and 0 to the narrowest
    one, with estimated times evenly in between (not measured ones: estimates are off); or None where no cut is so fast.
    Where no trial is within the time, the fastest is given back. Returns (threshold, measured).
    """
    tried = list[tuple[float, float]]()
    below, above = (0.0, 0.0), (1.0, 1.0)  # (way, measured): the slowest within the time, the fastest beyond it
    for _ in range(CORRECTIONS):
        step = ((1 + NEAR) / 2 * asked - below[1]) / max(above[1] - below[1], 1e-9)
        way = below[0] + float(np.clip(step, INSIDE, 1 - INSIDE)) * (above[0] - below[0])
        found = cut_at(way)
        if found is None:
            break
        tried.append(found)
        if NEAR * asked <= found[1] <= asked:
            break
        below, above = ((way, found[1]), above) if found[1] <= asked else (below, (way, found[1]))
    within = [each for each in tried if each[1] <= asked]
    return max(within, key=lambda each: each[1]) if within else min(tried, key=lambda each: each[1], default=None)
