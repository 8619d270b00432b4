"""Normalising keeps the function and the interface, whatever year and exporter a model comes from."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import ModelError
from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import relative_difference, run_model
from onnxprune.graph.model import open_model
from onnxprune.labels import analyse
from onnxprune.labels.units import find_units
from onnxprune.normalising.normalise import normalise
from tests.conftest import MODELS
from tests.graphs import check_oracle, graph, proto

DYNAMIC_RESHAPE = """(float[N,4,6] x, float[6,8] w, float[8,5] v) => (float[N,M,5] y)
<int64 zero = {0}, int64[1] axis = {0}, int64[1] rows = {2}, int64[1] rest = {2}, int64[1] eight = {8}>
{ h = MatMul(x, w) s = Shape(h) n = Gather(s, zero) u = Unsqueeze(n, axis) t = Concat<axis=0>(u, rows, rest, eight)
  r = Reshape(h, t) k = Constant<value = int64[3] {0, 4, 8}>() z = Reshape(r, k) y = MatMul(z, v) }"""


def test_shape_arithmetic_becomes_constant_and_the_batch_stays_dynamic() -> None:
    model = graph(DYNAMIC_RESHAPE)
    assert not [node for node in model.graph if node.op_type in ("Shape", "Gather", "Concat")]
    for batch in (1, 5):
        assert run_model(model, random_inputs(model, 0, batch))[0].shape == (batch, 4, 5)
    units = check_oracle(model)
    assert [len(group.units) for group in units.groups] == [8]


def test_shared_vectors_are_cloned() -> None:
    text = """(float[N,6] x, float[6,6] w, float[6,6] u, float[6] b, float[6,5] v) => (float[N,5] y)
    { h = Gemm(x, w, b) r = Relu(h) k = Gemm(r, u, b) y = MatMul(k, v) }"""
    model = graph(text)
    assert all(len(value.uses()) <= 1 for value in model.graph.initializers.values())
    assert [len(group.units) for group in check_oracle(model).groups] == [6, 6]


def test_tied_weights_stay_tied() -> None:
    """A table that embeds the input and reads the output is one matrix before and after."""
    text = """(int64[N,4] x, float[9,8] t, float[8,8] w) => (float[N,4,9] y)
    { h = Gather(t, x) k = MatMul(h, w) s = Add(h, k) y = Einsum<equation="bsd,vd->bsv">(s, t) }"""
    model = graph(text)
    assert len(model.graph.initializers["t"].uses()) == 2
    assert [len(group.units) for group in check_oracle(model).groups] == [8]


def test_initializers_among_the_inputs_of_an_old_model() -> None:
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((8, 3, 3, 3)).astype(np.float32), "w")
    infos = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6]),
        helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 3, 3, 3]),
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 4, 4])
    node = helper.make_node("Conv", ["x", "w"], ["y"])
    old = helper.make_model(
        helper.make_graph([node], "old", infos, [out], [weight]),
        opset_imports=[helper.make_opsetid("", 8)],
        ir_version=3,
    )
    model = normalise(ir.from_proto(old))
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert model.opset_imports[""] >= 17


@pytest.mark.parametrize("name", ["digits_resnet", "digits_mlp", "digits_vit", "digits_gru"])
def test_models_keep_their_outputs_and_interface(name: str) -> None:
    before = open_model(MODELS / f"{name}.onnx")
    after = normalise(before)
    for batch in (1, 4):
        inputs = random_inputs(before, batch, batch)
        pairs = zip(run_model(before, inputs), run_model(after, inputs), strict=True)
        assert max(relative_difference(a, b) for a, b in pairs) < 1e-5
    assert [value.name for value in after.graph.inputs] == [value.name for value in before.graph.inputs]
    assert [value.name for value in after.graph.outputs] == [value.name for value in before.graph.outputs]


def test_batch_normalisation_is_kept() -> None:
    model = normalise(open_model(MODELS / "digits_resnet.onnx"))
    assert sum(node.op_type == "BatchNormalization" for node in model.graph) == 9


def test_local_functions_are_inlined() -> None:
    main = proto("(float[N,6] x, float[6,8] w, float[8,5] v) => (float[N,5] y) { h = MatMul(x, w) y = MatMul(h, v) }")
    body = [helper.make_node("Relu", ["a"], ["b"])]
    main.functions.append(helper.make_function("local", "Act", ["a"], ["b"], body, [helper.make_opsetid("", 21)]))
    main.opset_import.append(helper.make_opsetid("local", 1))
    main.graph.node.insert(1, helper.make_node("Act", ["h"], ["r"], domain="local"))
    main.graph.node[2].input[0] = "r"
    model = normalise(ir.from_proto(main))
    assert [node.op_type for node in model.graph] == ["MatMul", "Relu", "MatMul"]


def test_an_operator_that_onnxruntime_lacks() -> None:
    model = proto("(float[N,6] x, float[6,8] w) => (float[N,8] y) { y = MatMul(x, w) }")
    model.graph.node.append(helper.make_node("Magic", ["y"], ["z"], domain="my.company"))
    model.opset_import.append(helper.make_opsetid("my.company", 1))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    with pytest.raises(ModelError, match=r"onnxruntime can't run the model.*"):
        normalise(ir.from_proto(model))


def test_subgraphs_lock_what_they_use() -> None:
    then = helper.make_graph(
        [helper.make_node("Identity", ["h"], ["a"])], "then", [], [helper.make_tensor_value_info("a", 1, None)]
    )
    other = helper.make_graph(
        [helper.make_node("Neg", ["h"], ["b"])], "else", [], [helper.make_tensor_value_info("b", 1, None)]
    )
    model = proto("(float[N,6] x, float[6,8] w, float[8,5] v) => (float[N,5] y) { h = MatMul(x, w) y = MatMul(h, v) }")
    model.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    model.graph.node.insert(1, helper.make_node("If", ["c"], ["g"], then_branch=then, else_branch=other))
    model.graph.node[2].input[0] = "g"
    onnx.checker.check_model(model)
    units = find_units(analyse(normalise(ir.from_proto(model))))
    assert not units.groups


def test_sound_is_long() -> None:
    """A stack of strides that leaves nothing of a sequence of a few hundred samples, as in wav2vec2."""
    model = graph(
        """(float[N, T] x, float[4, 1, 400] w, float[4, 4, 8] v) => (float[N, 4, M] y) {
            axes = Constant<value_ints: ints = [1]>()
            row = Unsqueeze(x, axes)
            h = Conv<strides: ints = [160]>(row, w)
            y = Conv<strides: ints = [4]>(h, v)
        }"""
    )
    assert random_inputs(model, 0)["x"].shape[1] > 400 + 7 * 160
