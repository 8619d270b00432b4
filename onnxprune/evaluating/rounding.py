"""How exactly inputs are known: noise of the size of their own rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
SEEN = 2**16  # numbers from which the grid is told
LEVELS = 4096  # different numbers, at most, on a grid of even steps


def rounding_noise(inputs: Mapping[str, Array], seed: int = 0) -> dict[str, Array]:
    """The inputs moved by up to half a step of the numbers that they were rounded to; integers stay.

    The step is that of an even grid where the numbers lie on one (pixels of 8 bits, sound of 16), else that of float16
    where all are such numbers, else that of their own type.
    """
    rng = np.random.default_rng(seed)
    return {name: _moved(np.asarray(array), rng) for name, array in inputs.items()}


def _moved(array: Array, rng: np.random.Generator) -> Array:
    if array.dtype.kind != "f" or not array.size:
        return array
    noise = rng.uniform(-0.5, 0.5, array.shape)
    return np.asarray(array + noise * _step(array), array.dtype)


def _step(array: Array) -> Array | float:
    """The distance between neighbouring numbers: one for all, or by number."""
    different = np.unique(np.ravel(array)[:SEEN].astype(np.float64))
    if 2 < len(different) <= LEVELS:
        steps = np.diff(different)
        least = float(steps[steps > 1e-9 * np.abs(different).max()].min(initial=np.inf))
        counts = steps / least
        if np.isfinite(least) and np.abs(counts - np.round(counts)).max() < 0.05:
            return least
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if array.dtype == np.float64 or not np.array_equal(half.astype(array.dtype), array):
        return np.spacing(np.abs(array))
    return np.spacing(np.abs(half)).astype(np.float64)
