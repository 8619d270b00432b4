"""Scores from calibration data, against their equations."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.sources import as_dataset
from onnxprune.graph.model import open_model
from onnxprune.labels import analyse
from onnxprune.labels.units import find_units, prunable
from onnxprune.normalising.normalise import normalise
from onnxprune.scoring.activations import ACTIVATION_CRITERIA, DAMPING
from tests.conftest import MODELS
from tests.graphs import graph

MLP = """(float[N,6] x, float[6,8] w, float[8] b, float[8,5] v) => (float[N,5] y)
    { h = Gemm(x, w, b) r = Relu(h) y = MatMul(r, v) }"""


@pytest.mark.parametrize("criterion", ACTIVATION_CRITERIA)
def test_scores_follow_their_equations(criterion: str) -> None:
    units = find_units(analyse(graph(MLP)))
    (group,) = units.groups
    x = np.random.default_rng(0).standard_normal((64, 6)).astype(np.float32)
    w, b, v = (units.model.graph.initializers[name].const_value.numpy().astype(np.float64) for name in "wbv")  # type: ignore[union-attr]
    read = np.maximum(x @ w + b, 0)
    norms, gram = (v**2).sum(1), read.T @ read / len(read)
    damped = gram + DAMPING * np.trace(gram) / 8 * np.eye(8)
    expected = {
        "activation": np.abs(read).mean(0),
        "flap": read.var(0) * norms,
        "obs": norms / np.diag(np.linalg.inv(damped)),
    }[criterion]
    found = ACTIVATION_CRITERIA[criterion](units, Dataset({"x": x}, None))
    np.testing.assert_allclose(found[group.units], expected / expected.mean(), rtol=1e-4)


@pytest.mark.parametrize("criterion", ACTIVATION_CRITERIA)
@pytest.mark.parametrize("name", ["digits_resnet", "digits_vit", "digits_gru"])
def test_every_prunable_unit_of_a_real_model_is_scored(criterion: str, name: str) -> None:
    model = normalise(open_model(MODELS / f"{name}.onnx"))
    units = prunable(model, name)
    scores = ACTIVATION_CRITERIA[criterion](units, as_dataset(str(MODELS / "digits.npz"), model, None))
    assert np.isfinite(scores).all() and (scores >= 0).all()
    assert all((scores[group.units] > 0).any() for group in units.groups)
