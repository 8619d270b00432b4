"""What a training step does with gradients: the optimizer, in NumPy, and the schedule of its learning rate."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
BETAS, EPSILON = (0.9, 0.999), 1e-8
WARM = 0.05  # of the training
USUAL, LEAST = 0.1, 1e-3  # root mean squares of a matrix: at which the rate is the step, and the least that counts
RATE = 7.5e-3  # for one matrix


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2); vectors and scalars don't decay.

    With `relative`, the steps of a matrix are in proportion to the root mean square that it starts with (Shazeer and
    Stern 2018, Adafactor, section 8): where normalisation is folded, or inputs are in 0 to 255, matrices differ a
    hundredfold in scale, and a step that suits one would wipe out another.
    """

    def __init__(self, weights: dict[str, Array], decay: float, relative: bool = True) -> None:
        self.weights, self.decay, self.step_count = weights, decay, 0
        self.first = {name: np.zeros_like(array) for name, array in weights.items()}
        self.second = {name: np.zeros_like(array) for name, array in weights.items()}
        self.scale = {name: scale_of(array) if relative else np.float32(1) for name, array in weights.items()}

    def step(self, gradients: dict[str, Array], rate: float) -> None:
        """Changes the weights in place."""
        self.step_count += 1
        one, two = (1 - beta**self.step_count for beta in BETAS)
        for name, gradient in gradients.items():
            m, v, w = self.first[name], self.second[name], self.weights[name]
            m += np.float32(1 - BETAS[0]) * (gradient - m)
            v += np.float32(1 - BETAS[1]) * (np.square(gradient) - v)
            if w.ndim > 1:
                w *= np.float32(1 - rate * self.decay)
            w -= self.scale[name] * np.float32(rate / one) * m / (np.sqrt(v / np.float32(two)) + np.float32(EPSILON))


def scale_of(array: Array) -> np.float32:
    """What the steps of a parameter are multiplied by; 1 for a vector or a scalar."""
    if array.ndim < 2:
        return np.float32(1)
    return np.float32(max(math.sqrt(np.square(array, dtype=np.float64).mean()), LEAST) / USUAL)


def usual_rate(matrices: int) -> float:
    """The peak learning rate for a network of so many matrices, where none is given.

    Each of N matrices moves by the same share of itself, in a direction of its own: what they change together grows
    with sqrt(N), and the rate falls with it (for depth: Yang et al. 2024, Tensor Programs VI, section 4).
    """
    return RATE / math.sqrt(max(matrices, 1))


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine to a hundredth of the peak; `progress` is in [0, 1)."""
    if progress < WARM:
        return peak * max(progress, 0.1 * WARM) / WARM
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - WARM) / (1 - WARM))))
