"""Operators that act on every element by itself: one operand passes its labels on, several tie theirs."""

from __future__ import annotations

import onnx_ir as ir

from onnxprune.labels.flow import Flow, Vector, given, rule

UNARY = """
    Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid
    HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh
    Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu Dropout BitCast com.microsoft::QuickGelu com.microsoft::Gelu
"""
BROADCAST = """
    Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod
    Mul Or Pow PRelu Sub Sum Where Xor com.microsoft::BiasGelu com.microsoft::FastGelu
"""

SUMS = ("Add", "Sum")


@rule(*UNARY.split())
def unary(flow: Flow, node: ir.Node) -> None:
    """`x -> f(x)`: the labels of x; the same for every output (Dropout's mask)."""
    for output in node.outputs:
        flow.give(output, flow.of(node.inputs[0]))


@rule("CastLike")
def cast_like(flow: Flow, node: ir.Node) -> None:
    """`x, type -> x`."""
    for vector in flow.of(node.inputs[1]):
        flow.end(vector)
    flow.give(node.outputs[0], flow.of(node.inputs[0]))


@rule(*BROADCAST.split())
def broadcast(flow: Flow, node: ir.Node) -> None:
    """`x, y, ... -> f(x, y, ...)`: axes are aligned from the last and tied; an axis of size one constrains nothing."""
    operands = [value for value in node.inputs if value is not None]
    flow.give(node.outputs[0], broadcast_axes(flow, operands))


def broadcast_axes(flow: Flow, operands: list[ir.Value]) -> list[Vector]:
    """The labels of what operands broadcast to, after tying them."""
    shapes = [flow.shape(value) for value in operands]
    if any(shape is None for shape in shapes):
        for value in operands:
            flow.lock_all(flow.of(value), "the shape of an operand is unknown")
        return []
    rank = max(len(shape) for shape in shapes if shape is not None)
    summed = flow.node is not None and flow.node.op_type in SUMS and not any(v.is_initializer() for v in operands)
    result: list[Vector] = []
    for axis in range(-rank, 0):
        wide = [
            flow.of(value)[axis]
            for value, shape in zip(operands, shapes, strict=True)
            if shape is not None and len(shape) >= -axis and shape[axis] != 1
        ]
        for other in wide[1:]:
            flow.tie(wide[0], other)
        if len(wide) > 1 and wide[0] is not None and summed:
            flow.kinds.append((wide[0], "residual"))
        result.append(wide[0] if wide and all(vector is not None for vector in wide) else None)
    return result


@rule("Shape")
def shape_of(flow: Flow, node: ir.Node) -> None:
    """The sizes themselves are data: an axis whose size is read can't be cut."""
    source = given(node, 0)
    vectors = flow.of(source)
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else len(vectors)
    for vector in vectors:
        flow.end(vector)  # what isn't read
    flow.lock_all(vectors[start:end], "its size is read by Shape")


@rule("Size")
def size_of(flow: Flow, node: ir.Node) -> None:
    """As Shape, of all axes."""
    flow.lock_all(flow.of(node.inputs[0]), "its size is read by Size")
