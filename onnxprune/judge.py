"""The judge of a run: measures every model on the same evaluation data, against the uncut one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.data import Dataset
from onnxprune.evaluate import METRICS, Metric, log_probabilities, predict

Arrays = list[NDArray[Any]]


@dataclass(frozen=True)
class Verdict:
    """A model's metric, the points it lost against the uncut model, its loss, and its cosine to the uncut outputs."""

    value: float
    drop: float
    loss: float
    cosine: float


@dataclass(frozen=True)
class Judge:
    """Measures models on `evaluation` by `metric`. `measured` is False where the data is only random inputs."""

    baseline: ir.Model
    evaluation: Dataset
    metric: Metric
    threads: int | None
    measured: bool

    @cached_property
    def _reference(self) -> Arrays:
        return predict(self.baseline, self.evaluation, self.threads)

    def measure(self, model: ir.Model, limit: int | None = None) -> Verdict:
        """The verdict on all of the evaluation data, or on its first `limit` samples."""
        data = self.evaluation.take(slice(0, limit))
        reference = [array[:limit] for array in self._reference]
        outputs = predict(model, data, self.threads)
        base = self.metric.compute(reference, data.labels, reference)
        value = self.metric.compute(outputs, data.labels, reference)
        cosine = METRICS["cosine"].compute(outputs, None, reference)
        return Verdict(value, self.metric.drop(base, value), loss_of(outputs, data.labels, reference), cosine)


def loss_of(outputs: Arrays, labels: NDArray[Any] | None, reference: Arrays) -> float:
    """Cross-entropy on class labels in nats, mean square error on float labels, else one minus the cosine."""
    scores = outputs[0]
    if labels is not None and labels.dtype.kind == "f" and labels.size == scores.size:
        return float(np.mean(np.square(scores.ravel() - labels.ravel())))
    if labels is None or labels.dtype.kind == "f" or labels.size != scores.size // scores.shape[-1]:
        return 1 - METRICS["cosine"].compute(outputs, None, reference) / 100
    rows = log_probabilities(scores.astype(np.float64).reshape(-1, scores.shape[-1]))
    return float(-np.take_along_axis(rows, labels.reshape(-1, 1).astype(np.int64), 1).mean())
