"""Matrix products. A weight is an operand like any other: its free axis brings the output's labels."""

from __future__ import annotations

import onnx_ir as ir

from onnxprune.labels.flow import Flow, Vector, given, integer, rule

CONTRACTED = "the axis that it is multiplied with can't be cut"


@rule("MatMul", "com.microsoft::FusedMatMul")
def matmul(flow: Flow, node: ir.Node) -> None:
    """`x[*b,i,k], y[*b,k,j] -> z[*b,i,j]`: k is tied, i and j pass, batch axes broadcast. Vectors lack i or j."""
    values = [node.inputs[0], node.inputs[1]]
    shapes = [flow.shape(value) for value in values]
    if node.domain and any(node.attributes[name].as_int() for name in ("transA", "transB") if name in node.attributes):
        return lock_operands(flow, node, "a transposing FusedMatMul")
    if values[0] is None or values[1] is None or not shapes[0] or not shapes[1]:
        return lock_operands(flow, node, "the shape of an operand is unknown")
    x, y = flow.of(values[0]), flow.of(values[1])
    flow.tie(x[-1], y[-2] if len(y) > 1 else y[-1], CONTRACTED)
    if not any(value.is_initializer() for value in values if value is not None) and x[-1] is not None:
        flow.reluctant.append(x[-1])  # between two activations this is a head's inner axis: heads go first
    batch = _batch_axes(flow, (x[:-2], y[:-2]), (shapes[0][:-2], shapes[1][:-2]))
    outer: list[Vector] = [*x[-2:-1], *(y[-1:] if len(y) > 1 else ())]
    flow.give(node.outputs[0], [*batch, *outer])


def _batch_axes(
    flow: Flow, vectors: tuple[tuple[Vector, ...], ...], shapes: tuple[tuple[int | None, ...], ...]
) -> list[Vector]:
    rank = max(len(shape) for shape in shapes)
    result: list[Vector] = []
    for axis in range(-rank, 0):
        wide = [
            vector[axis]
            for vector, shape in zip(vectors, shapes, strict=True)
            if len(shape) >= -axis and shape[axis] != 1
        ]
        if len(wide) == 2:
            flow.tie(wide[0], wide[1])
        result.append(wide[0] if wide and all(vector is not None for vector in wide) else None)
    return result


@rule("Gemm")
def gemm(flow: Flow, node: ir.Node) -> None:
    """`a[i,k], b[k,j], c -> y[i,j]`, with a and b transposed on request and c broadcast to y."""
    a, b = flow.of(node.inputs[0]), flow.of(node.inputs[1])
    if len(a) != 2 or len(b) != 2:
        return lock_operands(flow, node, "the shape of an operand is unknown")
    a = a[::-1] if integer(node, "transA", 0) else a
    b = b[::-1] if integer(node, "transB", 0) else b
    flow.tie(a[1], b[0], CONTRACTED)
    if (c := given(node, 2)) is not None:
        for axis, (vector, size) in enumerate(zip(flow.of(c), flow.shape(c) or (), strict=True), 2 - len(flow.of(c))):
            if size != 1:
                flow.tie(vector, (a[0], b[1])[axis])
    flow.give(node.outputs[0], (a[0], b[1]))


def lock_operands(flow: Flow, node: ir.Node, reason: str) -> None:
    """Locks every axis of every operand."""
    for value in node.inputs:
        flow.lock_all(flow.of(value), reason)
