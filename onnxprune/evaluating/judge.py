"""The judge of a run: measures every model on the same evaluation data, against the uncut one and against guessing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.errors import ModelError, UsageError
from onnxprune.evaluating.data import IGNORED, Dataset, class_axis
from onnxprune.evaluating.evaluate import predict
from onnxprune.evaluating.metrics import (
    METRICS,
    Metric,
    answers,
    explained,
    fidelity,
    log_probabilities,
)
from onnxprune.evaluating.rounding import rounding_noise

FOLDS = 10  # disjoint parts of the data, from whose drops the error of the whole is told
ORDERS = 20  # wrong orders of the uncut model's answers, by which a metric shows what guessing has
CLEAR = 3.0  # standard deviations between the uncut model and guessing, from which they count as different
NOISE_SAMPLES = 256  # on which the uncut model is run with noise, at most
UNIT = 1e-3  # from 1, of the norms of embeddings that are normalised

Arrays = list[NDArray[Any]]


@dataclass(frozen=True)
class Verdict:
    """A model's metric, what it lost against the uncut model, its loss, and its fidelity to the uncut outputs.

    `fidelity` is the share of their spread that is kept, at most 1. `error` is the standard error of the drop: how far
    it may be, by chance, from the drop on endless data. `most` is what decisions count as the drop. `useful` is how
    much is left of what the uncut model has above guessing, 1 for all, by the measure that shows least.
    """

    value: float
    drop: float
    loss: float
    fidelity: float
    error: float
    most: float
    useful: float = 1.0


@dataclass(frozen=True)
class Judge:
    """Measures models on `evaluation` by `metric`. `measured` is False where the data is only random inputs.

    Where the data is `fair` decisions count one standard error on top of a drop, since of many cuts the luckiest is
    taken. A part of the training data with labels, not set `apart`, makes drops look larger as it is: the uncut model
    knows it by heart. `weights` are those of the outputs in fidelity.
    """

    baseline: ir.Model
    evaluation: Dataset
    metric: Metric
    threads: int | None
    measured: bool
    apart: bool = True
    weights: tuple[float, ...] | None = None

    @cached_property
    def _reference(self) -> Arrays:
        return self._outputs(self.baseline, self.evaluation)

    def _outputs(self, model: ir.Model, data: Dataset) -> Arrays:
        """What a model says, with class scores along the last axis of the first output."""
        outputs, labels = predict(model, data, self.threads), data.labels
        if labels is not None and labels.dtype.kind != "f" and class_axis(outputs[0].shape, labels.shape) == 1:
            outputs[0] = np.moveaxis(outputs[0], 1, -1)
        return outputs

    @property
    def fair(self) -> bool:
        """Whether the data is fair to the uncut model: set apart from training, or without labels to know by heart."""
        return self.apart or self.evaluation.labels is None

    def measure(self, model: ir.Model, limit: int | None = None) -> Verdict:
        """The verdict on all of the evaluation data, or on its first `limit` samples."""
        data = self.evaluation.take(slice(0, limit))
        reference = [array[:limit] for array in self._reference]
        outputs = self._outputs(model, data)
        value, drop = self._drop(outputs, data.labels, reference)
        kept, parts = fidelity(outputs, reference, self.weights), list[float]()
        if len(data) >= FOLDS and all(len(array) == len(data) for array in outputs):
            for fold in (slice(i, None, FOLDS) for i in range(FOLDS)):
                labels = None if data.labels is None else data.labels[fold]
                parts.append(self._drop([array[fold] for array in outputs], labels, [a[fold] for a in reference])[1])
        error = float(np.std(parts, ddof=1) / FOLDS**0.5) if len(parts) and np.isfinite(parts).all() else 0.0
        most = drop + error if self.fair else drop
        useful = min(self._above_guessing(value), self._kept_answers(outputs, reference))
        return Verdict(value, drop, self._loss(outputs, data.labels, reference), kept, error, most, useful)

    def _drop(self, outputs: Arrays, labels: NDArray[Any] | None, reference: Arrays) -> tuple[float, float]:
        """The metric, and how far it is below the uncut model's."""
        value = self.metric.compute(outputs, labels, reference)
        return value, self.metric.drop(self.metric.compute(reference, labels, reference), value)

    def _loss(self, outputs: Arrays, labels: NDArray[Any] | None, reference: Arrays) -> float:
        """Cross-entropy on class labels in nats, mean square error on float labels, else one minus the fidelity."""
        scores = outputs[0]
        if labels is not None and labels.dtype.kind == "f" and labels.size == scores.size:
            return float(np.mean(np.square(scores.ravel() - labels.ravel())))
        if labels is None or labels.dtype.kind == "f" or labels.size != scores.size // scores.shape[-1]:
            return 1 - fidelity(outputs, reference, self.weights)
        rows = log_probabilities(scores.astype(np.float64).reshape(-1, scores.shape[-1]))
        wanted = labels.reshape(-1).astype(np.int64)
        counted = np.flatnonzero(wanted != IGNORED)
        return float(-rows[counted, wanted[counted]].mean())

    # ---- what figures are to be seen beside

    @cached_property
    def uncut(self) -> float:
        """The uncut model's metric."""
        return self.metric.compute(self._reference, self.evaluation.labels, self._reference)

    @cached_property
    def _wrong_orders(self) -> list[float]:
        """The metric of the uncut model's answers, each given to another sample."""
        rng, count, found = np.random.default_rng(0), len(self.evaluation), list[float]()
        if count < 2 or any(len(array) != count for array in self._reference):
            return found
        for _ in range(ORDERS):
            order = rng.permutation(count)
            given = [array[order] for array in self._reference]
            found.append(self._of_guess(given))
        return [value for value in found if math.isfinite(value)]

    def _of_guess(self, outputs: Arrays) -> float:
        try:
            return self.metric.compute(outputs, self.evaluation.labels, self._reference)
        except UsageError:  # a function of the user's may not like answers that are all the same
            return math.nan

    @cached_property
    def guess(self) -> float | None:
        """What guessing has by the metric: the best of constant answers and of answers in a wrong order.

        A metric that a constant wins by (the recall of one class) is measured against answers in a wrong order alone.
        None where it can't be told.
        """
        if self.metric.name == "fidelity":
            return 0.0
        found = [float(np.mean(self._wrong_orders))] if self._wrong_orders else []
        beaten = [value for value in self._of_constants if self.metric.drop(self.uncut, value) > 0]
        found += beaten if self.metric.own else self._of_constants
        return min(found, key=lambda value: self.metric.drop(self.uncut, value)) if found else None

    @cached_property
    def _of_constants(self) -> list[float]:
        """The metric of answers that are the same for all samples."""
        return [value for each in self._constants() if math.isfinite(value := self._of_guess(each))]

    @cached_property
    def _won_by_constants(self) -> bool:
        """Whether a constant answer is as good as the uncut model by a metric of the user's (recall of one class)."""
        return self.metric.own and any(self.metric.drop(self.uncut, value) <= 0 for value in self._of_constants)

    def _constants(self) -> Iterator[Arrays]:
        """Answers that don't look at the sample: the uncut model's mean, and what labels say is best."""
        for each in self._reference:
            if not each.ndim or not each.size or each.dtype.kind not in "fiu":
                return
        yield [np.broadcast_to(a.mean(0, keepdims=True).astype(a.dtype), a.shape) for a in self._reference]
        first, labels = self._reference[0], self.evaluation.labels
        if labels is None:
            return
        best: list[Any] = []
        if labels.dtype.kind == "f" and labels.size == first.size:
            rows = labels.reshape(first.shape)
            best = [rows.mean(0, keepdims=True), np.median(rows, 0, keepdims=True)]
        elif labels.dtype.kind in "iu" and first.ndim > 1:
            counted = labels[labels != IGNORED].astype(np.int64)
            if counted.size and counted.max() < first.shape[-1]:
                best = [np.bincount(counted.ravel(), minlength=first.shape[-1]) / counted.size]
        for each in best:
            yield [np.broadcast_to(np.asarray(each, first.dtype), first.shape), *self._reference[1:]]

    @cached_property
    def unclear(self) -> str | None:
        """Why the uncut model can't be told from guessing by the metric; None where it can."""
        if self.guess is None:
            return None
        wrong = [self.metric.drop(self.uncut, value) for value in self._wrong_orders]
        chance = float(np.mean(wrong)) > CLEAR * float(np.std(wrong)) if wrong else True
        if self.metric.drop(self.uncut, self.guess) > 0 and chance:
            return None
        return f"{self.metric.name} {self.uncut:.4g}, while guessing has {self.guess:.4g}"

    def _above_guessing(self, value: float) -> float:
        """How much is left of what the uncut model has above guessing, by the metric."""
        if self.guess is None or not self.measured:
            return 1.0
        whole = self.metric.drop(self.uncut, self.guess)
        left = self.metric.drop(value, self.guess)
        return left / whole if whole > 0 and math.isfinite(value) else (1.0 if value == self.uncut else -math.inf)

    @cached_property
    def decides(self) -> tuple[int, ...]:
        """The outputs that give classes: what ends in a softmax, along the last axis."""
        values = self.baseline.graph.outputs
        return tuple(
            index
            for index, (value, array) in enumerate(zip(values, self._reference, strict=True))
            if array.ndim > 1 and array.shape[-1] > 1 and _is_softmax(value)
        )

    def _kept_answers(self, outputs: Arrays, reference: Arrays) -> float:
        """How much agreement of answers there is above the most frequent one, where nothing better tells.

        That is without labels, and for a metric of the user's, which a constant may win by; where outputs are no
        classes and one does, it is the fidelity.
        """
        labels = self.evaluation.labels
        if not self.measured or (labels is not None and not self.metric.own):
            return 1.0
        classes = labels is not None and labels.dtype.kind in "iu" and outputs[0].ndim > 1
        found = [
            kept
            for index in ((0,) if classes else self.decides)
            if outputs[index].shape == reference[index].shape
            for kept in explained([answers(outputs[index])], [answers(reference[index])])
        ]
        if self._won_by_constants and not found:
            found.append(fidelity(outputs, reference, self.weights))
        return min((kept for kept in found if not math.isnan(kept)), default=1.0)

    def beside(self, model: ir.Model) -> dict[str, float]:
        """Figures without labels for a report: fidelity, and agreement or similarities where outputs are such."""
        outputs = self._outputs(model, self.evaluation)
        found = {"fidelity": fidelity(outputs, self._reference, self.weights)}
        if self._has_classes:
            found["agreement"] = METRICS["agreement"].compute(outputs, None, self._reference) / 100
            found["kl"] = METRICS["kl"].compute(outputs, None, self._reference) if self._reference[0].ndim > 1 else 0.0
        if self._is_embedding:
            found["spearman"] = METRICS["spearman"].compute(outputs, None, self._reference) / 100
        return found

    @cached_property
    def _has_classes(self) -> bool:
        labels = self.evaluation.labels
        return 0 in self.decides or (labels is not None and labels.dtype.kind in "iu" and self._reference[0].ndim > 1)

    @cached_property
    def _is_embedding(self) -> bool:
        """Whether each sample's first output is a vector of length one."""
        first = self._reference[0]
        if first.ndim != 2 or first.shape[1] < 8 or first.dtype.kind != "f" or len(first) < 3:
            return False
        return bool(np.abs(np.linalg.norm(first.astype(np.float64), axis=1) - 1).max() < UNIT)

    @cached_property
    def noise(self) -> dict[str, float]:
        """The figures of `beside` of the uncut model on inputs that are off by their own rounding, at half a step."""
        part = self.evaluation.take(slice(0, NOISE_SAMPLES))
        judge = replace(self, evaluation=part)
        noisy = Dataset(rounding_noise(part.inputs), part.labels)
        try:
            outputs = judge._outputs(self.baseline, noisy)
            return {"fidelity": fidelity(outputs, judge._reference, self.weights)}
        except ModelError:
            return {}

    @cached_property
    def unexercised(self) -> list[str]:
        """The outputs that hardly differ from sample to sample, so that nothing can be said of them."""
        kept = explained(self._reference, self._reference)
        return [v.name or "" for v, k in zip(self.baseline.graph.outputs, kept, strict=True) if math.isnan(k)]

    def told(self) -> Judge:
        """The same judge with a metric whose direction and scale are known: declared, or inferred where that is safe.

        A direction is taken from how the metric takes the uncut model's answers in a wrong order, a scale from how far
        those, or a constant, are from the right ones. Raises `UsageError` where that can't be told.
        """
        metric = self.metric
        if metric.higher_is_better is None:
            wrong, uncut = self._wrong_orders, self.uncut
            apart = uncut - float(np.mean(wrong)) if wrong else 0.0
            if not math.isfinite(uncut) or not abs(apart) > CLEAR * float(np.std(wrong)) + 1e-9 * abs(uncut):
                said = f"{uncut:.4g}, and {np.mean(wrong):.4g} for them in a wrong order" if wrong else f"{uncut:.4g}"
                raise UsageError(
                    f"metric {metric.name} says {said}, for the uncut model's answers, so which direction is better "
                    "can't be told: put '@onnxprune.metric(higher_is_better=…, scale=…)' above the function"
                )
            metric = replace(metric, higher_is_better=apart > 0)
        judge = replace(self, metric=metric)
        if metric.own and metric.scale is None and metric.higher_is_better and judge.guess is not None:
            distance = metric.drop(judge.uncut, judge.guess)
            if distance > 0:
                judge = replace(self, metric=replace(metric, scale=distance))
        return judge


def _is_softmax(value: ir.Value) -> bool:
    """Whether a value holds the classes' probabilities, or their logarithms, along its last axis."""
    node, rank = value.producer(), len(value.shape) if value.shape is not None else 2
    while node is not None and node.op_type in ("Identity", "Cast") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type not in ("Softmax", "LogSoftmax"):
        return False
    axis = node.attributes.get("axis")
    return axis is None or axis.as_int() in (-1, rank - 1)
