"""Scores from the gradients of the loss on labelled calibration data, taken by the training worker."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import UsageError
from onnxprune.evaluating.data import Dataset
from onnxprune.labels.units import Units, weight_matrix
from onnxprune.scoring.score import Scores
from onnxprune.training import Loss, TrainingOptions, gradient_moments

SAMPLES = 512

Array = NDArray[np.float64]


def taylor(units: Units, data: Dataset) -> Scores:
    """The sum of |w dL/dw| over every parameter that a unit touches, with the mean gradient over calibration data.

    Molchanov et al. 2019, Importance Estimation for Neural Network Pruning, equation 8 without the square: how much the
    loss changes, to first order, when the unit's parameters become zero one by one.
    """
    return _over_parameters(units, data, lambda weights, mean, square: np.abs(weights * mean))


def fisher(units: Units, data: Dataset) -> Scores:
    """The sum of w^2 E[(dL/dw)^2] over every parameter that a unit touches.

    Theis et al. 2018, Faster gaze prediction with dense networks and Fisher pruning, equation 6: Optimal Brain Damage
    with the diagonal of the empirical Fisher matrix, here over gradients of small batches, for the Hessian.
    """
    return _over_parameters(units, data, lambda weights, mean, square: np.square(weights) * square)


def _over_parameters(units: Units, data: Dataset, form: Callable[[Array, Array, Array], Array]) -> Scores:
    """Raises `UsageError` without labels: the loss that is left, distance to the model itself, has no gradient."""
    if data.labels is None:
        raise UsageError("scores from gradients need labels: give --data with labels, or another --criterion")
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingOptions(loss=Loss(distillation=0.0))
        moments = gradient_moments(units.model, data.take(slice(0, SAMPLES)), Path(folder) / "gradients", options)
    total = np.zeros(units.count)
    for value, axis, vector in units.parameters:
        if value.name in moments:
            array = form(weight_matrix(value), *moments[value.name].astype(np.float64))
            rows = array.reshape(math.prod(array.shape[:axis]), array.shape[axis], -1)
            total += np.bincount(vector, rows.sum((0, 2)), units.count)
    return total


GRADIENT_CRITERIA: dict[str, Callable[[Units, Dataset], Scores]] = {"taylor": taylor, "fisher": fisher}
