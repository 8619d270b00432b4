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
from onnxprune.graph.model import constant, open_model
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
    "padded by name": "(float[N,3,9,8] x, float[6,3,4,3] w) => (float[N,6,A,B] y)"
        """{ y = Conv<auto_pad="SAME_UPPER", strides=[2,1]>(x, w) }""",
    "padded by name, more before": "(float[N,3,9] x, float[6,3,4] w, float[6] b) => (float[N,6,A] y)"
        """{ y = Conv<auto_pad="SAME_LOWER">(x, w, b) }""",
    "bias behind a convolution": "(float[N,3,8,8] x, float[6,3,3,3] w, float[1,6,1,1] b) => (float[N,6,6,6] y)"
        "{ h = Conv(x, w) y = Add(h, b) }",
    "turned": "(float[N,3,5] x, float[3,4,3] w, float[4] b) => (float[N,4,A] y)"
        "{ y = ConvTranspose<strides=[2], pads=[1,0]>(x, w, b) }",
    "turned, grouped, dilated": "(float[N,4,5,6] x, float[4,3,2,3] w) => (float[N,6,A,B] y)"
        "{ y = ConvTranspose<group=2, strides=[2,1], dilations=[1,2], output_padding=[1,0]>(x, w) }",
    "affine, scaled": "(float[6,N] x, float[6,5] w, float[5] b) => (float[N,5] y)"
        "{ y = Gemm<transA=1, alpha=0.5, beta=2.0>(x, w, b) }",
    "product from the left": "(float[N,6,7] x, float[5,6] w, float[5,1] b) => (float[N,5,7] y)"
        "{ h = MatMul(w, x) y = Add(h, b) }",
    "a product for each expert": "(float[N,3,7,6] x, float[3,6,5] w) => (float[N,3,7,5] y) { y = MatMul(x, w) }",
    "letters": """(float[N,7,6] x, float[2,6,5] w) => (float[N,2,7,5] y)
        { y = Einsum<equation="bti,hio->bhto">(x, w) }""",
    "letters, weights first": """(float[N,7,6] x, float[5,6] w) => (float[N,7,5] y)
        { y = Einsum<equation="oi,...i->...o">(w, x) }""",
    "letters, by group": """(float[N,7,2,6] x, float[2,6,5] w) => (float[N,7,2,5] y)
        { y = Einsum<equation="btgi,gio->btgo">(x, w) }""",
    "scale and shift": "(float[N,7,6] x, float[6] w, float[6] b) => (float[N,7,6] y)"
        "{ y = LayerNormalization(x, w, b) }",
    "scale and shift over space": "(float[N,5,7] x, float[5] w, float[5] b) => (float[N,5,7] y)"
        "{ y = InstanceNormalization(x, w, b) }",
    "shared by two": "(float[N,6] x, float[6,6] w) => (float[N,12] y)"
        "{ a = MatMul(x, w) s = Sin(x) c = MatMul(s, w) y = Concat<axis=1>(a, c) }",
    "shared, with a bias each": "(float[N,3,6] x, float[3,4,3] w) => (float[N,4,A] y) <float[4] b = {1,2,3,4},"
        "float[4] c = {4,3,2,1}> { a = ConvTranspose(x, w, b) s = Sin(x) d = ConvTranspose(s, w, c) y = Sub(a, d) }",
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
    assert len(reconstruct(other, model, Plan({}), data)) == 1
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
    assert len(reconstruct(pruned, model, plan, data)) == 2
    assert relative_difference(run_model(model, inputs), run_model(pruned, inputs)) < 0.02


RECURRENT = {
    "LSTM": "(float[T,N,5] x, float[1,24,5] w, float[1,24,6] r, float[1,48] b) => (float[T,1,N,6] y)"
        "{ y = LSTM<hidden_size=6>(x, w, r, b) }",
    "both directions": """(float[T,N,5] x, float[2,24,5] w, float[2,24,6] r, float[2,48] b) => (float[T,2,N,6] y)
        { y = LSTM<hidden_size=6, direction="bidirectional">(x, w, r, b) }""",
    "last state alone": "(float[T,N,5] x, float[1,24,5] w, float[1,24,6] r) => (float[1,N,6] h)"
        "{ y, h = LSTM<hidden_size=6>(x, w, r) }",
    "peepholes": "(float[T,N,5] x, float[1,24,5] w, float[1,24,6] r, float[1,48] b, float[1,18] p) =>"
        "(float[T,1,N,6] y) { y = LSTM<hidden_size=6>(x, w, r, b, , , , p) }",
    "GRU": "(float[T,N,5] x, float[1,18,5] w, float[1,18,6] r, float[1,36] b) => (float[T,1,N,6] y)"
        "{ y = GRU<hidden_size=6>(x, w, r, b) }",
    "GRU with its reset behind": "(float[T,N,5] x, float[1,18,5] w, float[1,18,6] r, float[1,36] b) =>"
        "(float[T,1,N,6] y) { y = GRU<hidden_size=6, linear_before_reset=1>(x, w, r, b) }",
    "RNN, backwards": """(float[T,N,5] x, float[1,6,5] w, float[1,6,6] r, float[1,12] b) => (float[T,1,N,6] y)
        { y = RNN<hidden_size=6, direction="reverse">(x, w, r, b) }""",
    "lengths and states": """(float[T,N,5] x, int32[N] n, float[2,N,6] h, float[2,N,6] c, float[2,24,5] w,
        float[2,24,6] r, float[2,48] b) => (float[T,2,N,6] y)
        { y = LSTM<hidden_size=6, direction="bidirectional">(x, w, r, b, n, h, c) }""",
}  # fmt: skip


def test_with_values_named_what_reads_them_first_is_fitted_and_nothing_else() -> None:
    """Through an activation, but through no other layer; a recurrent layer reads its own states."""
    text = """(float[N,3,6,6] x, float[8,3,1,1] a, float[6,8,1,1] b, float[5,6,1,1] c) => (float[N,5,6,6] y)
    { h = Conv(x, a) r = Relu(h) i = Conv(r, b) s = Relu(i) y = Conv(s, c) }"""
    model = graph(text)
    units = find_units(analyse(model))
    alive = np.ones(units.count, bool)
    alive[next(group for group in units.groups if len(group.units) == 8).units[4:]] = False
    pruned, plan = cut(units, alive)
    before = {name: constant(value).copy() for name, value in pruned.graph.initializers.items()}
    data = as_dataset({"x": random_inputs(model, 0, batch=64)["x"]}, model, None)
    done = reconstruct(pruned, model, plan, data, reading=set(plan.tensors))
    changed = {name for name, value in pruned.graph.initializers.items() if (constant(value) != before[name]).any()}
    assert [each.kind for each in done] == ["Conv"] and changed == {"b"}


def sequences(count: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Smooth signals, lengths and states, samples first."""
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal((count, length, 5)).cumsum(1) / 2
    return {
        "x": (steps - steps.mean(1, keepdims=True)).astype(np.float32), "n": rng.integers(3, length + 1, count),
        **{name: rng.standard_normal((count, 2, 6)).astype(np.float32) for name in "hc"},
    }  # fmt: skip


@pytest.mark.parametrize("name", RECURRENT)
def test_a_recurrent_layer_whose_weights_were_disturbed_is_found_again(name: str) -> None:
    turned = RECURRENT[name].replace("float[T,N,5] x", "float[N,T,5] z").replace("float[2,N,6] h", "float[N,2,6] hz")
    turned = turned.replace("float[2,N,6] c", "float[N,2,6] cz")
    parts = ["x = Transpose<perm=[1,0,2]>(z)"]
    parts += [f"{each} = Transpose<perm=[1,0,2]>({each}z)" for each in "hc" if f"{each}z" in turned]
    model = graph(turned.replace("{ ", "{ " + " ".join(parts) + " ", 1), inputs=("z", "n", "hz", "cz"))
    made = sequences(160, 12, 0)
    arrays = {"z": made["x"], "n": made["n"].astype(np.int32), "hz": made["h"], "cz": made["c"]}
    named = {value.name for value in model.graph.inputs}
    data = as_dataset({key: array for key, array in arrays.items() if key in named}, model, None)
    other, rng = model.clone(), np.random.default_rng(1)
    for value in other.graph.initializers.values():
        if value.name in ("w", "r", "b"):
            array = value.const_value.numpy()
            value.const_value = ir.tensor(array + 0.3 * rng.standard_normal(array.shape).astype(array.dtype))
    unseen = data.take(slice(128, 160))
    wanted, before = predict(model, unseen)[0], predict(other, unseen)[0]
    done = reconstruct(other, model, Plan({}), data.take(slice(0, 128)))
    assert [each.why_not for each in done] == [""]
    after = predict(other, unseen)[0]
    lack = np.square(after - wanted).sum() / np.square(before - wanted).sum()
    assert lack < 0.02, lack
    assert done[0].gained is not None and done[0].gained > 0.9


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(float[N,6,6] x, float[6,6] w) => (float[N,6,6] y) { a = MatMul(x, w) y = MatMul(w, a) }", "in another way"),
        ("(float[N,6] x, float[6,5] w, float b) => (float[N,5] y) { y = Gemm<alpha=0.0>(x, w, b) }", "zero"),
    ],
)
def test_what_is_left_alone_says_why(text: str, why: str) -> None:
    model = graph(text)
    data = as_dataset({"x": random_inputs(model, 0, batch=16)["x"]}, model, None)
    before = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    done = reconstruct(model, model.clone(), Plan({}), data)
    assert why in " ".join(each.why_not for each in done)
    assert all(np.array_equal(before[name], v.const_value.numpy()) for name, v in model.graph.initializers.items())


@pytest.mark.parametrize(("name", "least"), [("digits_resnet", 97.0), ("digits_vit", 88.0), ("digits_mlp", 94.0)])
def test_trained_models_come_back_without_training(name: str, least: float) -> None:
    model = normalise(open_model(MODELS / f"{name}.onnx"))
    train, test = (as_dataset(str(MODELS / f"{each}.npz"), model, None) for each in ("digits", "digits_test"))
    units = find_units(analyse(model))
    pruned, plan = cut(units, random_cut(units, np.random.default_rng(0), 0.3))
    rival = pruned.clone()
    reestimate_batch_norm(rival, train)
    assert reconstruct(pruned, model, plan, train)
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
        assert len(reconstruct(pruned, model, plan, data, memory=memory, note=said.append)) == 2
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
