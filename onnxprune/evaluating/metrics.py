"""Metrics: numbers for a model's outputs, each with its direction and scale, in one place.

To add one, write its function and a row in `METRICS`. A function of the user's says what it is by `metric`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from onnxprune.errors import DataError, ModelError, UsageError
from onnxprune.evaluating.data import IGNORED, Dataset
from onnxprune.evaluating.sources import load_function

Array = NDArray[Any]
Compute = Callable[[list[Array], Array | None, list[Array]], float]
F = TypeVar("F", bound=Callable[..., Any])
PERCENT = 100.0
TINY = 1e-30
PAIRS = 512  # samples whose pairwise similarities are compared, at most
LEAST_SPREAD = 1e-12  # of squares beside the values' own: below that it is rounding


@dataclass(frozen=True)
class Metric:
    """A number for a model's outputs. `compute(outputs, labels, reference outputs of the uncut model)`.

    `scale` is what lies between the worst and the best value, so that a point is a hundredth of it; None for errors,
    which have a unit of their own, and for metrics that don't say. `higher_is_better` None isn't known. `own` says that
    it is a function of the user's.
    """

    name: str
    compute: Compute
    higher_is_better: bool | None = True
    scale: float | None = PERCENT
    needs_labels: bool = False
    own: bool = False

    def drop(self, baseline: float, value: float) -> float:
        """How much was lost, in the metric's unit; negative when the value is better than the baseline."""
        return baseline - value if self.higher_is_better else value - baseline


def metric(*, higher_is_better: bool, scale: float | None = None) -> Callable[[F], F]:
    """Says of a metric function `f(outputs, labels)` which direction is better, and its scale.

    `scale` is the distance between the worst and the best value (1 for an accuracy between 0 and 1, 100 for percent):
    a point of `--max-drop` is a hundredth of it. Leave it out for errors, which are counted in their own unit.
    """
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise UsageError(f"scale {scale!r}: give the distance between the worst and the best value, above 0")

    def decorate(function: F) -> F:
        function.higher_is_better, function.scale = higher_is_better, scale  # type: ignore[attr-defined]
        return function

    return decorate


# ---- answers against the uncut model's: no labels


def explained(outputs: Sequence[Array], reference: Sequence[Array]) -> list[float]:
    """How much of each output's spread over samples is kept: `1 - sum |y - x|^2 / sum |x - mean x|^2`.

    x is the uncut model's output, and its mean is taken over samples, the first axis. 1 is the same, 0 no better than
    the best constant answer, which is what a cosine can't see. Of whole numbers and truth values it is what
    agreement has above the most frequent answer. NaN where the output has no spread on these samples, or another shape.
    """
    return [_explained(np.asarray(y), np.asarray(x)) for y, x in zip(outputs, reference, strict=True)]


def _explained(y: Array, x: Array) -> float:
    if y.shape != x.shape or not x.size or x.dtype.kind not in "fiub":
        return math.nan
    if x.dtype.kind != "f":
        guess = np.unique(x, return_counts=True)[1].max() / x.size
        return math.nan if guess == 1 else float(((y == x).mean() - guess) / (1 - guess))
    rows = x.reshape(len(x) if x.ndim else 1, -1).astype(np.float64)
    finite = np.isfinite(rows)
    rows = np.where(finite, rows, 0.0)
    count = np.maximum(finite.sum(0), 1)
    spread = float((np.where(finite, rows - rows.sum(0) / count, 0.0) ** 2).sum())
    if not spread > LEAST_SPREAD * float((rows**2).sum()):
        return math.nan
    error = np.where(finite, y.reshape(rows.shape).astype(np.float64) - rows, 0.0)
    kept = 1 - float((error**2).sum()) / spread
    return kept if math.isfinite(kept) else -math.inf


def fidelity(outputs: Sequence[Array], reference: Sequence[Array], weights: Sequence[float] | None = None) -> float:
    """The mean over outputs of `explained`, by weights; outputs without spread don't count. 1 where none has any.

    Raises `ModelError` where every output has another shape than the uncut model's.
    """
    if not any(np.shape(y) == np.shape(x) for y, x in zip(outputs, reference, strict=True)):
        raise ModelError(
            f"the outputs have other shapes than the uncut model's ({outputs[0].shape}, {reference[0].shape}), so "
            "models can't be compared by them: end it before what decides how much it gives, or use 'onnxprune prune'"
        )
    values = np.array(explained(outputs, reference))
    weighed = np.ones(len(values)) if weights is None else np.array(weights, np.float64)
    counted = ~np.isnan(values) & (weighed > 0)
    if not counted.any():
        return 1.0 if all(np.array_equal(y, x) for y, x in zip(outputs, reference, strict=True)) else 0.0
    return float((values * weighed)[counted].sum() / weighed[counted].sum())


def _centred_cosine(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
    """Mean over samples and outputs of the cosine of both models' outputs less the uncut model's mean, in percent."""
    values = []
    for y, x in zip(outputs, reference, strict=True):
        if y.shape != x.shape:
            continue
        a, b = (np.asarray(v, np.float64).reshape(len(v) if v.ndim else 1, -1) for v in (y, x))
        middle = b.mean(0) if len(b) > 1 else 0.0
        same, a, b = (a == b).all(1), a - middle, b - middle
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        values.append(np.where(same, 1.0, (a * b).sum(1) / np.maximum(norms, TINY)).mean())
    return float(np.mean(values) * PERCENT) if values else math.nan


def _spearman(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
    """Rank correlation of the cosines between samples in the first output with those of the uncut model, in percent."""
    from scipy.stats import spearmanr

    similar = []
    for array in (outputs[0], reference[0]):
        rows = np.asarray(array, np.float64).reshape(len(array), -1)[:PAIRS]
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), TINY)
        similar.append((rows @ rows.T)[np.triu_indices(len(rows), 1)])
    if len(similar[0]) < 2:
        return math.nan
    found = float(spearmanr(*similar).statistic) * PERCENT
    return found if math.isfinite(found) else 0.0


def log_probabilities(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-softmax of rows of scores; rows that are probabilities already only take the logarithm."""
    if (scores >= 0).all() and np.allclose(scores.sum(-1), 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(scores, TINY)), np.float64)
    shifted = scores - scores.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float64)


def _kl(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
    """Mean KL divergence from the uncut model's class probabilities, in nats."""
    p, q = log_probabilities(_rows(reference[0])), log_probabilities(_rows(outputs[0]))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _agreement(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
    """How many answers, the largest entry or the side of a half of a single one, are the uncut model's, in percent."""
    return float((answers(outputs[0]) == answers(reference[0])).mean() * PERCENT)


def answers(scores: Array) -> Array:
    """The class of each row of scores; of a single number whether it is above a half, as for probabilities."""
    rows = _rows(scores)
    return np.asarray(rows.argmax(-1) if rows.shape[1] > 1 else rows[:, 0] > 0.5)


# ---- answers against labels


def _rows(array: Array) -> NDArray[np.float64]:
    """Class scores as (positions, classes)."""
    return (
        array.astype(np.float64).reshape(-1, array.shape[-1]) if array.ndim > 1 else array.astype(np.float64)[:, None]
    )


def _top(k: int) -> Compute:
    def compute(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
        scores, wanted = _rows(outputs[0]), np.ravel(labels if labels is not None else [])
        if wanted.dtype.kind not in "iu" or len(wanted) != len(scores):
            raise DataError(f"{_beside(outputs, labels)}: top{k} wants one class index (int64) for each row of scores")
        scores, wanted = scores[wanted != IGNORED], wanted[wanted != IGNORED]
        own = np.take_along_axis(scores, wanted[:, None], 1)
        better, level = (scores > own).sum(1), np.maximum((scores == own).sum(1), 1)
        right = np.clip((k - better) / level, 0, 1)  # equal scores share their places: a constant answer only guesses
        return float(np.where(np.isnan(scores).any(1), 0.0, right).mean() * PERCENT)

    return compute


def _beside(outputs: list[Array], labels: Array | None) -> str:
    """What doesn't fit, for a message."""
    given = np.asarray(labels)
    return f"array 'labels' is {given.dtype} of shape {given.shape}, the first output has shape {outputs[0].shape}"


def _errors(outputs: list[Array], labels: Array | None) -> NDArray[np.float64]:
    """The differences between what is and what should be, element by element."""
    found, wanted = outputs[0].astype(np.float64).ravel(), np.ravel(np.asarray(labels, np.float64))
    if len(found) != len(wanted):
        raise DataError(f"{_beside(outputs, labels)}: give a number for each of the output's, or class indices (int64)")
    return np.asarray(found - wanted)


def _mse(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
    return float(np.mean(np.square(_errors(outputs, labels))))


def _mae(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
    return float(np.mean(np.abs(_errors(outputs, labels))))


def _by_function(name: str) -> Metric:
    """A function of the user's, with what it says of itself."""
    try:
        function = load_function(name)
    except DataError as error:
        raise UsageError(f"--metric {error}") from error

    def compute(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
        try:
            return float(function(outputs, labels))
        except Exception as error:
            raise UsageError(f"metric {name} failed: {type(error).__name__}: {error}") from error

    higher, scale = getattr(function, "higher_is_better", None), getattr(function, "scale", None)
    if not (scale is None or (isinstance(scale, int | float) and math.isfinite(scale) and scale > 0)):
        raise UsageError(f"metric {name} says scale {scale!r}: that is the distance from worst to best, above 0")
    return Metric(name, compute, None if higher is None else bool(higher), scale, own=True)


def fidelity_metric(weights: Sequence[float] | None = None) -> Metric:
    """The default without labels: the share of the outputs' spread that is kept, in percent."""
    return Metric("fidelity", lambda outputs, labels, reference: fidelity(outputs, reference, weights) * PERCENT)


METRICS = {
    "fidelity": fidelity_metric(),
    "mse": Metric("mse", _mse, higher_is_better=False, scale=None, needs_labels=True),
    "mae": Metric("mae", _mae, higher_is_better=False, scale=None, needs_labels=True),
    "cosine": Metric("cosine", _centred_cosine),
    "spearman": Metric("spearman", _spearman),
    "kl": Metric("kl", _kl, higher_is_better=False, scale=None),
    "agreement": Metric("agreement", _agreement),
}
NAMES = ("topK", *METRICS, "module:function")


def find_metric(name: str | None, data: Dataset, weights: Sequence[float] | None = None) -> Metric:
    """The metric of that name; by default top-1 accuracy, MSE for float labels, and fidelity without labels.

    `topK` is accuracy in percent; fidelity, cosine (of what differs from the mean), spearman (of the similarities of
    samples) and agreement are percent of the uncut model's outputs; `module:function` is called with (outputs: list of
    arrays, labels) and returns a float (see `metric`). `weights` are those of the outputs in fidelity.
    Raises `UsageError` for an unknown name, `DataError` when it needs labels and there are none.
    """
    if name is None:
        name = "fidelity" if data.labels is None else "mse" if data.labels.dtype.kind == "f" else "top1"
    if ":" in name:
        return _by_function(name)
    if name.startswith("top") and name[3:].isdigit() and int(name[3:]) > 0:
        found = Metric(name, _top(int(name[3:])), needs_labels=True)
    elif name in METRICS:
        found = fidelity_metric(weights) if name == "fidelity" else METRICS[name]
    else:
        raise UsageError(f"no metric is called {name!r}; known: {', '.join(NAMES)}")
    if found.needs_labels and data.labels is None:
        raise DataError(f"metric {name} needs labels: add an array 'labels', or use fidelity, kl or agreement")
    return found


def output_weights(given: Mapping[str, float], outputs: Sequence[str]) -> list[float] | None:
    """The weights of all outputs in fidelity, one where none is given. Raises `UsageError` for what is no output."""
    if unknown := [name for name in given if name not in outputs]:
        raise UsageError(f"--weigh {unknown[0]}: the model's outputs are {', '.join(outputs)}")
    if given and not any(given.get(name, 1.0) > 0 for name in outputs):
        raise UsageError("--weigh: give one output a weight above 0")
    return [given.get(name, 1.0) for name in outputs] if given else None
