"""Scores from gradients, against gradients by hand and on real models."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.errors import UsageError
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.sources import as_dataset
from onnxprune.graph.model import open_model
from onnxprune.labels import analyse
from onnxprune.labels.units import find_units, prunable
from onnxprune.normalising.normalise import normalise
from onnxprune.scoring.gradients import GRADIENT_CRITERIA
from tests.conftest import MODELS, needs_training
from tests.graphs import graph

MLP = "(float[N,6] x, float[6,8] w, float[8,5] v) => (float[N,5] y) { h = MatMul(x, w) y = MatMul(h, v) }"


@needs_training
@pytest.mark.parametrize("criterion", GRADIENT_CRITERIA)
def test_scores_follow_their_equations(criterion: str) -> None:
    units = find_units(analyse(graph(MLP)))
    (group,) = units.groups
    random = np.random.default_rng(0)
    x, labels = random.standard_normal((64, 6)).astype(np.float32), random.integers(0, 5, 64)
    w, v = (units.model.graph.initializers[name].const_value.numpy().astype(np.float64) for name in "wv")  # type: ignore[union-attr]
    means, squares = [np.zeros_like(w), np.zeros_like(v)], [np.zeros_like(w), np.zeros_like(v)]
    for rows in (slice(0, 32), slice(32, 64)):  # cross-entropy's gradient, in batches of 32
        scores = x[rows] @ w @ v
        p = np.exp(scores - scores.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(5)[labels[rows]]) / 32
        for i, gradient in enumerate((x[rows].T @ (error @ v.T), (x[rows] @ w).T @ error)):
            means[i] += gradient / 2
            squares[i] += gradient**2 / 2
    expected = {
        "taylor": np.abs(w * means[0]).sum(0) + np.abs(v * means[1]).sum(1),
        "fisher": (w**2 * squares[0]).sum(0) + (v**2 * squares[1]).sum(1),
    }[criterion]
    found = GRADIENT_CRITERIA[criterion](units, Dataset({"x": x}, labels))
    np.testing.assert_allclose(found[group.units], expected, rtol=1e-3)


@needs_training
@pytest.mark.parametrize("criterion", GRADIENT_CRITERIA)
@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit", "digits_gru"])
def test_every_prunable_unit_of_a_real_model_is_scored(criterion: str, name: str) -> None:
    model = normalise(open_model(MODELS / f"{name}.onnx"))
    units = prunable(model, name)
    scores = GRADIENT_CRITERIA[criterion](units, as_dataset(str(MODELS / "digits.npz"), model, None))
    assert np.isfinite(scores).all() and (scores >= 0).all()
    assert all((scores[group.units] > 0).any() for group in units.groups)


def test_without_labels_there_is_no_gradient() -> None:
    units = find_units(analyse(graph(MLP)))
    with pytest.raises(UsageError, match="labels"):
        GRADIENT_CRITERIA["taylor"](units, Dataset({"x": np.zeros((4, 6), np.float32)}, None))
