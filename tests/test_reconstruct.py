"""Repair by least squares: what a layer can still compute, it computes again."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest

from onnxprune.cutting.cut import cut
from onnxprune.cutting.plan import Plan
from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import predict, relative_difference, run_model
from onnxprune.evaluating.metrics import find_metric
from onnxprune.evaluating.sources import as_dataset
from onnxprune.graph.model import open_model
from onnxprune.labels import analyse
from onnxprune.labels.units import find_units
from onnxprune.normalising.normalise import normalise
from onnxprune.repairing.reconstruct import reconstruct
from onnxprune.repairing.repair import reestimate_batch_norm, undo_if_worse
from tests.conftest import MODELS
from tests.graphs import graph, random_cut

LAYERS = {
    "convolution": "(float[N,3,8,8] x, float[6,3,3,3] w) => (float[N,6,6,6] y) { y = Conv(x, w) }",
    "padded, strided, dilated": "(float[N,3,9,11] x, float[6,3,3,2] w, float[6] b) => (float[N,6,A,B] y)"
        "{ y = Conv<pads=[1,2,0,1], strides=[2,3], dilations=[2,1]>(x, w, b) }",
    "one dimension": "(float[N,3,12] x, float[6,3,4] w) => (float[N,6,9] y) { y = Conv(x, w) }",
    "three dimensions": "(float[N,2,5,5,5] x, float[4,2,2,2,2] w) => (float[N,4,4,4,4] y) { y = Conv(x, w) }",
    "depthwise": "(float[N,4,6,6] x, float[4,1,3,3] w, float[4] b) => (float[N,4,4,4] y)"
        "{ y = Conv<group=4>(x, w, b) }",
    "grouped": "(float[N,4,6,6] x, float[6,2,3,3] w) => (float[N,6,4,4] y) { y = Conv<group=2>(x, w) }",
    "product": "(float[N,7,6] x, float[6,5] w) => (float[N,7,5] y) { y = MatMul(x, w) }",
    "product and bias": "(float[N,7,6] x, float[6,5] w, float[5] b) => (float[N,7,5] y)"
        "{ h = MatMul(x, w) y = Add(b, h) }",
    "affine": "(float[N,6] x, float[6,5] w, float[5] b) => (float[N,5] y) { y = Gemm(x, w, b) }",
    "affine, transposed": "(float[N,6] x, float[5,6] w, float[5] b) => (float[N,5] y)"
        "{ y = Gemm<transB=1>(x, w, b) }",
    "branch of a sum behind a norm": "(float[N,4,6,6] x, float[4,4,3,3] w, float[4] s, float[4] b, float[4] m,"
        "float[4] var) => (float[N,4,6,6] z) { h = Conv<pads=[1,1,1,1]>(x, w)"
        "n = BatchNormalization(h, s, b, m, var) y = Add(n, x) z = Relu(y) }",
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_whose_weights_were_disturbed_is_found_again(name: str) -> None:
    model = graph(LAYERS[name])
    data = as_dataset({"x": random_inputs(model, 0, batch=256)["x"]}, model, None)
    other, rng = model.clone(), np.random.default_rng(1)
    for value in other.graph.initializers.values():
        if value.name in ("w", "b") and not ("norm" in name and value.name == "b"):
            array = value.const_value.numpy()
            value.const_value = ir.tensor(array + rng.standard_normal(array.shape).astype(array.dtype), name=value.name)
    inputs = random_inputs(model, 5, batch=4)
    assert relative_difference(run_model(model, inputs), run_model(other, inputs)) > 0.1
    assert reconstruct(other, model, Plan({}), data) == 1
    assert relative_difference(run_model(model, inputs), run_model(other, inputs)) < 0.01


def test_what_was_removed_is_made_from_what_is_left() -> None:
    """Each removed channel is a multiple of one that stays, or constant: the next layer can do without it."""
    text = """(float[N,3,6,6] x, float[8,3,1,1] w, float[8] b, float[5,8,3,3] v, float[5] c) => (float[N,5,4,4] y)
    { h = Conv(x, w, b) r = Relu(h) y = Conv(r, v, c) }"""
    model = graph(text)
    for name in ("w", "b"):
        value = model.graph.initializers[name]
        array = value.const_value.numpy().copy()
        array[4:7] = 0.5 * array[:3]
        array[7] = 2.0 if name == "b" else 0.0
        value.const_value = ir.tensor(array, name=name)
    units = find_units(analyse(model))
    alive = np.ones(units.count, bool)
    alive[units.groups[0].units[4:]] = False
    pruned, plan = cut(units, alive)
    data = as_dataset({"x": random_inputs(model, 0, batch=128)["x"]}, model, None)
    inputs = random_inputs(model, 9, batch=4)
    assert relative_difference(run_model(model, inputs), run_model(pruned, inputs)) > 0.1
    assert reconstruct(pruned, model, plan, data) == 2
    assert relative_difference(run_model(model, inputs), run_model(pruned, inputs)) < 0.02


@pytest.mark.parametrize(
    "text",
    [
        "(float[N,6] x, float[6,6] w, float[6,5] v) => (float[N,6] y)"
        "{ h = MatMul(x, w) y = MatMul(h, w) }",
        "(float[N,6] x, float[6,5] w) => (float[N,5] y) { y = Gemm<alpha=0.5>(x, w) }",
    ],
)  # fmt: skip
def test_what_is_left_alone(text: str) -> None:
    model = graph(text)
    data = as_dataset({"x": random_inputs(model, 0, batch=16)["x"]}, model, None)
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    assert reconstruct(model, model.clone(), Plan({}), data) == 0
    assert all(np.array_equal(before[name], v.const_value.numpy()) for name, v in model.graph.initializers.items())


@pytest.mark.parametrize(("name", "least"), [("digits_resnet", 97.0), ("digits_vit", 88.0), ("digits_mlp", 94.0)])
def test_trained_models_come_back_without_training(name: str, least: float) -> None:
    model = normalise(open_model(MODELS / f"{name}.onnx"))
    train, test = (as_dataset(str(MODELS / f"{each}.npz"), model, None) for each in ("digits", "digits_test"))
    units = find_units(analyse(model))
    pruned, plan = cut(units, random_cut(units, np.random.default_rng(0), 0.3))
    rival = pruned.clone()
    reestimate_batch_norm(rival, train)
    assert reconstruct(pruned, model, plan, train) > 0
    top1 = find_metric("top1", test)
    before, after = (top1.compute(predict(each, test), test.labels, []) for each in (rival, pruned))
    assert after >= max(least, before + 2)


def test_less_memory_means_coarser_not_more() -> None:
    model = graph("""(float[N,900] x, float[900,800] w, float[800] b, float[800,10] v) => (float[N,10] y)
    { h = Gemm(x, w, b) r = Relu(h) y = MatMul(r, v) }""")
    units = find_units(analyse(model))
    alive = np.ones(units.count, bool)
    alive[units.groups[0].units[::2]] = False
    data = as_dataset({"x": random_inputs(model, 0, batch=512)["x"]}, model, None)
    inputs = random_inputs(model, 9, batch=200)
    wanted, lacks = run_model(model, inputs), dict[int, float]()
    for memory in (2**31, 2**24):
        pruned, plan = cut(units, alive)
        before, said = relative_difference(wanted, run_model(pruned, inputs)), list[str]()
        tracemalloc.start()
        assert reconstruct(pruned, model, plan, data, memory=memory, note=said.append) == 2
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert held < memory
        assert bool(said) == (memory < 2**30), said
        lacks[memory] = relative_difference(wanted, run_model(pruned, inputs)) / before
    assert lacks[2**31] < 0.9 and lacks[2**24] < 0.95, lacks


def test_a_repair_that_does_harm_is_undone() -> None:
    model, other = (normalise(open_model(MODELS / "digits_mlp.onnx")) for _ in range(2))
    data = as_dataset(str(MODELS / "digits.npz"), model, None)
    for value in other.graph.initializers.values():
        array = value.const_value.numpy()  # type: ignore[union-attr]
        if array.dtype == np.float32:
            value.const_value = ir.tensor(array * np.float32(0.9), name=value.name)
    better = other.clone()
    for worse in (other, model):
        harmed = worse.clone()
        for value in harmed.graph.initializers.values():
            array = value.const_value.numpy()  # type: ignore[union-attr]
            if array.dtype == np.float32:
                value.const_value = ir.tensor(-array, name=value.name)
        assert undo_if_worse(harmed, worse, model, data)
        found, wanted = (predict(each, data)[0] for each in (harmed, worse))
        assert (found == wanted).all()
    assert not undo_if_worse(model.clone(), better, model, data)
