"""Reductions along axes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxprune.labels.flow import integer, integers
from onnxprune.model import constant
from onnxprune.training.lowering.base import Lowerer, first, lowering


@lowering("ReduceMax", "ReduceMin", "GlobalMaxPool")
def _extreme(lower: Lowerer, node: ir.Node) -> None:
    """The mean of the elements that equal the extreme: where it is reached several times, they share the gradient."""
    x, kept = first(node), integer(node, "keepdims", 1)
    rank = len(lower.sizes(node, x))
    axes = list(range(2, rank)) if node.op_type == "GlobalMaxPool" else _axes(lower, node, rank)
    if not axes:
        lower.replace_by(node, x)
        return
    op = "ReduceMin" if node.op_type == "ReduceMin" else "ReduceMax"
    if lower.opset < 18:
        extreme = lower.add(node, op, [x], axes=axes, keepdims=1)
    else:
        extreme = lower.add(node, op, [x, lower.integers(node, *axes)], keepdims=1)
    there = lower.add(node, "Cast", [lower.add(node, "Equal", [x, extreme])], to=int(ir.DataType.FLOAT))
    chosen = lower.sum(node, lower.add(node, "Mul", [x, there]), axes)
    mean = lower.add(node, "Div", [chosen, lower.sum(node, there, axes)])
    if not kept:
        mean = lower.add(node, "Squeeze", [mean, lower.integers(node, *axes)])
    lower.replace_by(node, mean)


def _axes(lower: Lowerer, node: ir.Node, rank: int) -> list[int]:
    given = integers(node, "axes")
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = constant(node.inputs[1])
        if array is None:
            raise lower.refusal(node, "its axes aren't constant")
        given = [int(axis) for axis in array]
    if not given:
        return [] if integer(node, "noop_with_empty_axes", 0) else list(range(rank))
    return sorted(axis % rank for axis in given)


@lowering("CumSum")
def _running_sum(lower: Lowerer, node: ir.Node) -> None:
    """The product with a triangular matrix along the axis."""
    x, at = first(node), constant(node.inputs[1])
    shape = lower.sizes(node, x)
    if at is None:
        raise lower.refusal(node, "its axis isn't constant")
    axis = int(at.reshape(-1)[0]) % len(shape)
    matrix = np.tri(shape[axis], k=-integer(node, "exclusive", 0), dtype=np.float32)
    if integer(node, "reverse", 0):
        matrix = np.ascontiguousarray(matrix.T)
    lower.replace_by(node, lower.along_axis(node, x, len(shape), axis, matrix))
