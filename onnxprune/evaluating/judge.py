"""The judge of a run: measures every model on the same evaluation data, against the uncut one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.evaluating.data import IGNORED, Dataset, class_axis
from onnxprune.evaluating.evaluate import METRICS, Metric, log_probabilities, predict

FOLDS = 10  # disjoint parts of the data, from whose drops the error of the whole is told

Arrays = list[NDArray[Any]]


@dataclass(frozen=True)
class Verdict:
    """A model's metric, the points it lost against the uncut model, its loss, and its cosine to the uncut outputs.

    `error` is the standard error of the drop: how far it may be, by chance, from the drop on endless data. `most` is
    what decisions count as the drop.
    """

    value: float
    drop: float
    loss: float
    cosine: float
    error: float
    most: float


@dataclass(frozen=True)
class Judge:
    """Measures models on `evaluation` by `metric`. `measured` is False where the data is only random inputs.

    Where the data was set `apart` decisions count one standard error on top of a drop, since of many cuts the luckiest
    is taken. A part of the training data makes drops look larger as it is: the uncut model knows it by heart.
    """

    baseline: ir.Model
    evaluation: Dataset
    metric: Metric
    threads: int | None
    measured: bool
    apart: bool = True

    @cached_property
    def _reference(self) -> Arrays:
        return self._outputs(self.baseline, self.evaluation)

    def _outputs(self, model: ir.Model, data: Dataset) -> Arrays:
        """What a model says, with class scores along the last axis of the first output."""
        outputs, labels = predict(model, data, self.threads), data.labels
        if labels is not None and labels.dtype.kind != "f" and class_axis(outputs[0].shape, labels.shape) == 1:
            outputs[0] = np.moveaxis(outputs[0], 1, -1)
        return outputs

    def measure(self, model: ir.Model, limit: int | None = None) -> Verdict:
        """The verdict on all of the evaluation data, or on its first `limit` samples."""
        data = self.evaluation.take(slice(0, limit))
        reference = [array[:limit] for array in self._reference]
        outputs = self._outputs(model, data)
        value, drop = self._drop(outputs, data.labels, reference)
        cosine, parts = METRICS["cosine"].compute(outputs, None, reference), list[float]()
        if len(data) >= FOLDS and all(len(array) == len(data) for array in outputs):
            for fold in (slice(i, None, FOLDS) for i in range(FOLDS)):
                labels = None if data.labels is None else data.labels[fold]
                parts.append(self._drop([array[fold] for array in outputs], labels, [a[fold] for a in reference])[1])
        error = float(np.std(parts, ddof=1) / FOLDS**0.5) if parts else 0.0
        most = drop + error if self.apart else drop
        return Verdict(value, drop, loss_of(outputs, data.labels, reference), cosine, error, most)

    def _drop(self, outputs: Arrays, labels: NDArray[Any] | None, reference: Arrays) -> tuple[float, float]:
        """The metric, and how far it is below the uncut model's."""
        value = self.metric.compute(outputs, labels, reference)
        return value, self.metric.drop(self.metric.compute(reference, labels, reference), value)


def loss_of(outputs: Arrays, labels: NDArray[Any] | None, reference: Arrays) -> float:
    """Cross-entropy on class labels in nats, mean square error on float labels, else one minus the cosine."""
    scores = outputs[0]
    if labels is not None and labels.dtype.kind == "f" and labels.size == scores.size:
        return float(np.mean(np.square(scores.ravel() - labels.ravel())))
    if labels is None or labels.dtype.kind == "f" or labels.size != scores.size // scores.shape[-1]:
        return 1 - METRICS["cosine"].compute(outputs, None, reference) / 100
    rows = log_probabilities(scores.astype(np.float64).reshape(-1, scores.shape[-1]))
    wanted = labels.reshape(-1).astype(np.int64)
    counted = np.flatnonzero(wanted != IGNORED)
    return float(-rows[counted, wanted[counted]].mean())
