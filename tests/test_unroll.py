"""Control flow that is decided before a model runs becomes ordinary nodes; the rest stays, and locks what it reads."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import relative_difference, run_model
from onnxprune.labels import analyse
from onnxprune.labels.units import find_units
from onnxprune.normalising.normalise import normalise
from tests.graphs import check_oracle


def recurrence(count: int, early: bool = False) -> onnx.ModelProto:
    """`h <- tanh(x u + h w)`, `count` times, then a linear layer; `early`: it ends when the state says so."""
    rng = np.random.default_rng(0)
    info = helper.make_tensor_value_info
    go = [helper.make_node("Identity", ["going"], ["on"])]
    if early:
        go = [
            helper.make_node("ReduceMax", ["state"], ["most"], keepdims=0),
            helper.make_node("Less", ["most", "limit"], ["on"]),
        ]
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "u"], ["a"]),
            helper.make_node("MatMul", ["h", "w"], ["b"]),
            helper.make_node("Add", ["a", "b"], ["c"]),
            helper.make_node("Tanh", ["c"], ["state"]),
            helper.make_node("Identity", ["state"], ["seen"]),
            *go,
        ],
        "body",
        [info("i", TensorProto.INT64, []), info("going", TensorProto.BOOL, []), info("h", TensorProto.FLOAT, None)],
        [
            info("on", TensorProto.BOOL, []),
            info("state", TensorProto.FLOAT, None),
            info("seen", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "z"], ["start"]),
        helper.make_node("Loop", ["count", "true", "start"], ["last", "all"], body=body),
        helper.make_node("ReduceSum", ["all", "zero"], ["total"], keepdims=0),
        helper.make_node("Add", ["last", "total"], ["sum"]),
        helper.make_node("MatMul", ["sum", "v"], ["y"]),
    ]
    arrays = {
        "u": rng.standard_normal((6, 8)), "w": rng.standard_normal((8, 8)), "z": rng.standard_normal((6, 8)),
        "v": rng.standard_normal((8, 5)), "limit": np.array(0.5),
    }  # fmt: skip
    weights = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    weights += [
        numpy_helper.from_array(np.array(count, np.int64), "count"),
        numpy_helper.from_array(np.array(True), "true"),
        numpy_helper.from_array(np.array([0], np.int64), "zero"),
    ]
    graph = helper.make_graph(
        nodes, "loop", [info("x", TensorProto.FLOAT, ["N", 6])], [info("y", TensorProto.FLOAT, ["N", 5])], weights
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_a_loop_of_known_length_is_pruned() -> None:
    proto = recurrence(3)
    model = normalise(ir.from_proto(proto))
    assert not [node for node in model.graph if node.op_type == "Loop"]
    assert sum(value.const_value.size for value in model.graph.initializers.values() if value.name == "w") == 64
    units = check_oracle(model)
    assert [len(group.units) for group in units.groups] == [8]


def test_a_loop_that_the_data_may_end_stays_and_locks() -> None:
    original = ir.from_proto(recurrence(3, early=True))
    model = normalise(original)
    assert [node for node in model.graph if node.op_type == "Loop"]
    assert not find_units(analyse(model)).groups
    inputs = random_inputs(original, 3)
    assert relative_difference(run_model(original, inputs)[0], run_model(model, inputs)[0]) < 1e-6


def test_a_long_loop_stays() -> None:
    model = normalise(ir.from_proto(recurrence(1000)))
    assert [node for node in model.graph if node.op_type == "Loop"]


def test_a_branch_that_is_decided_is_taken() -> None:
    info = helper.make_tensor_value_info
    branches = {
        name: helper.make_graph([helper.make_node(op, ["h"], [name])], name, [], [info(name, TensorProto.FLOAT, None)])
        for name, op in (("then_branch", "Relu"), ("else_branch", "Neg"))
    }
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("If", ["flag"], ["g"], **branches),
        helper.make_node("MatMul", ["g", "v"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(rng.standard_normal((6, 8)).astype(np.float32), "w"),
        numpy_helper.from_array(rng.standard_normal((8, 5)).astype(np.float32), "v"),
        numpy_helper.from_array(np.array(False), "flag"),
    ]
    graph = helper.make_graph(
        nodes, "if", [info("x", TensorProto.FLOAT, ["N", 6])], [info("y", TensorProto.FLOAT, ["N", 5])], weights
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    model = normalise(ir.from_proto(proto))
    assert [node.op_type for node in model.graph] == ["MatMul", "Neg", "MatMul"]
    assert [len(group.units) for group in check_oracle(model).groups] == [8]


def test_elements_of_known_sequences_are_read_directly() -> None:
    info = helper.make_tensor_value_info
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("SequenceConstruct", ["h", "r"], ["s"]),
        helper.make_node("SequenceAt", ["s", "one"], ["e"]),
        helper.make_node("ConcatFromSequence", ["s"], ["c"], axis=1),
        helper.make_node("MatMul", ["e", "v"], ["p"]),
        helper.make_node("MatMul", ["c", "u"], ["q"]),
        helper.make_node("Add", ["p", "q"], ["y"]),
    ]
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("w", (6, 8)), ("v", (8, 5)), ("u", (16, 5)))
    ]
    weights.append(numpy_helper.from_array(np.array(1, np.int64), "one"))
    graph = helper.make_graph(
        nodes, "seq", [info("x", TensorProto.FLOAT, ["N", 6])], [info("y", TensorProto.FLOAT, ["N", 5])], weights
    )
    model = normalise(
        ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    )
    assert "Sequence" not in "".join(node.op_type for node in model.graph)
    assert [len(group.units) for group in check_oracle(model).groups] == [8]
