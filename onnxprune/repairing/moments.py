"""Ridge regression from sums over samples."""

from __future__ import annotations

import contextlib

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

Array = NDArray[np.float64]
Sample = NDArray[np.float32]

SILENT = 1e-3  # of the mean, below which an input counts as that much


class Moments:
    """Sums over samples of inputs by inputs and of inputs by what is lacking: (groups, inputs, inputs or outputs)."""

    def __init__(self) -> None:
        self.gram = self.cross = np.zeros((1, 1, 1))
        self.square, self.rows = 0.0, 0

    def add(self, inputs: Sample, lack: Sample) -> None:
        """More samples: (groups, samples, inputs or outputs)."""
        turned = inputs.swapaxes(1, 2)
        self.gram = self.gram + (turned @ inputs).astype(np.float64)
        self.cross = self.cross + (turned @ lack).astype(np.float64)
        self.square += float(np.square(lack, dtype=np.float64).sum())
        self.rows += inputs.shape[1]

    def merge(self, other: Moments) -> None:
        """Adds the samples of another."""
        self.gram, self.cross = self.gram + other.gram, self.cross + other.cross
        self.square, self.rows = self.square + other.square, self.rows + other.rows

    def solved(self, share: float) -> Array:
        """The change of the weights that makes up for what is lacking, by ridge regression.

        `share` is lambda in units of the mean diagonal of the Gram matrix.
        """
        means = np.trace(self.gram, axis1=1, axis2=2) / self.gram.shape[1]
        ridge = share * np.maximum(means, max(SILENT * float(means.mean()), 1e-12))
        damped = self.gram + ridge[:, None, None] * np.eye(self.gram.shape[1])
        if len(damped) == 1:
            with contextlib.suppress(np.linalg.LinAlgError):  # positive definite, but for rounding
                return cho_solve(cho_factor(damped[0], overwrite_a=True, check_finite=False), self.cross[0])[None]
        return np.linalg.solve(damped, self.cross)

    def gain(self, delta: Array) -> float:
        """By how much a change lowers the sum of squares of what is lacking."""
        return float(2 * (delta * self.cross).sum() - (delta * (self.gram @ delta)).sum())
