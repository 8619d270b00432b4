"""Fine-tuning that helps: the start is a candidate, rates are tried, and outputs count by their spread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import onnxprune
from onnxprune import RunOptions
from onnxprune.cutting.plan import Plan, Removal
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.evaluate import run_model
from onnxprune.evaluating.metrics import fidelity
from onnxprune.graph.model import open_model
from onnxprune.training import TrainingOptions, fine_tune
from onnxprune.training.client import _portions
from onnxprune.training.forward import teacher_graph
from onnxprune.training.losses import in_units, plan_loss, with_features
from tests.conftest import MODELS, needs_training
from tests.graphs import graph

TWO = """(float[N,6] x, float[6,24] v, float[24,3] w, float[24,3] u) => (float[N,3] y, float[N,3] z)
{ h = MatMul(x, v) r = Relu(h) y = MatMul(r, w) z = MatMul(r, u) }"""


def taught(samples: int = 300) -> tuple[ir.Model, Dataset]:
    x = np.random.default_rng(0).standard_normal((samples, 6)).astype(np.float32)
    return graph(TWO), Dataset({"x": x}, None)


def shaken(model: ir.Model, by: float) -> ir.Model:
    """A copy with noise on its weights."""
    rng, result = np.random.default_rng(1), model.clone()
    for name, value in result.graph.initializers.items():
        array = value.const_value.numpy()  # type: ignore[union-attr]
        value.const_value = ir.tensor(
            (array + by * array.std() * rng.standard_normal(array.shape)).astype(np.float32), name=name
        )
    return result


@needs_training
def test_where_training_can_only_harm_the_start_comes_back(tmp_path: Path) -> None:
    model, data = taught()
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
    tuned = model.clone()
    fine_tune(tuned, model, data, tmp_path / "job", TrainingOptions(epochs=2, lr=0.5))
    for name, array in before.items():
        assert np.array_equal(tuned.graph.initializers[name].const_value.numpy(), array)  # type: ignore[union-attr]


@needs_training
@pytest.mark.parametrize("trainer", ["ort", "graph"])
def test_rates_are_tried_and_the_choice_is_kept_for_a_resumed_run(trainer: Any, tmp_path: Path) -> None:
    model, data = taught()
    thin, said = shaken(model, 0.3), list[str]()
    reference = run_model(model, data.inputs)

    def hear(event: dict[str, Any]) -> None:
        if event["event"] == "note":
            said.append(event["message"])

    start = fidelity(run_model(thin, data.inputs), reference)
    fine_tune(thin, model, data, tmp_path / "job", TrainingOptions(trainer=trainer, epochs=6), progress=hear)
    assert any(line.startswith("learning rate") for line in said)
    assert json.loads((tmp_path / "job" / "rate.json").read_text()) > 0
    assert fidelity(run_model(thin, data.inputs), reference) > start + 0.5 * (1 - start)


def test_every_output_counts_by_its_spread() -> None:
    model, data = taught()
    plan = plan_loss(model, data)
    rng = np.random.default_rng(0)
    small, large = 1e-3 * rng.standard_normal((100, 3)), 50 + 1e3 * rng.standard_normal((100, 3))
    counted = in_units(plan, [small, large])
    units = [distance.unit for distance in counted.distances]
    assert units == [pytest.approx(small.var(0).mean(), rel=1e-6), pytest.approx(large.var(0).mean(), rel=1e-6)]
    flat = in_units(plan, [np.ones((100, 3)), large])
    assert [distance.weight for distance in flat.distances] == [0.0, 1.0]


def test_of_what_was_cut_the_teacher_gives_what_is_left() -> None:
    text = """(float[N,3,6,6] x, float[WIDTH,3,3,3] w, float[4,WIDTH,3,3] v) => (float[N,4,2,2] y)
    { h = Conv(x, w) r = Relu(h) y = Conv(r, v) }"""
    whole, cut = (graph(text.replace("WIDTH", str(size))) for size in (8, 6))
    for name in ("h", "r"):
        assert any(value.name == name for node in whole.graph for value in node.outputs)
    removed = {name: (Removal(1, 8, (2, 5)),) for name in ("h", "r")}
    data = Dataset({"x": np.random.default_rng(0).standard_normal((4, 3, 6, 6)).astype(np.float32)}, None)
    loss = with_features(cut, whole, plan_loss(cut, data), 1.0, Plan(removed))
    assert loss.features == ("r",) and dict(loss.kept)["r"] == [(1, [0, 1, 3, 4, 6, 7])]
    outputs = run_model(teacher_graph(whole, loss), data.inputs)
    assert outputs[1].shape == (4, 6, 4, 4)


@pytest.mark.parametrize("samples", [5, 12, 26, 96, 307, 1000, 40_000])
@pytest.mark.parametrize("fixed", [None, 1, 4])
def test_some_samples_are_held_out_however_few_there_are(samples: int, fixed: int | None) -> None:
    shard, batch, held = _portions(samples, None, fixed, 512, 32)
    assert 0 < shard <= 32 and batch % shard == 0 and held % shard == 0 and batch + held <= samples
    if samples >= 12 and fixed != 4:
        assert held > 0
    if samples < 1000 and fixed is None:
        assert batch <= 32


@needs_training
def test_without_labels_what_comes_out_is_no_worse_than_what_went_in(tmp_path: Path) -> None:
    """On samples that neither run saw."""
    with np.load(MODELS / "digits.npz") as data, np.load(MODELS / "digits_test.npz") as test:
        given, unseen = {"input": data["input"][:1000]}, {"input": test["input"]}
    model = MODELS / "digits_gru.onnx"
    reference, found = run_model(open_model(model), unseen), dict[int, float]()
    for epochs in (0, 2, 12):
        out = tmp_path / f"{epochs}.onnx"
        way = {"criterion": "l2", "scope": "gradual"}
        options = RunOptions(target_macs=0.3, epochs=epochs, bench_seconds=0.1, force=True, **way)  # type: ignore[arg-type]
        onnxprune.run(model, given, output=out, options=options)
        found[epochs] = fidelity(run_model(open_model(out), unseen), reference)
    assert found[2] > found[0] - 0.01 and 1 - found[12] < 0.9 * (1 - found[0]), found
