"""Normalisations, softmax and reductions. What mixes the positions of a cut axis is inexact, or locks it."""

from __future__ import annotations

import onnx_ir as ir

from onnxprune.labels.flow import Flow, Vector, integer, integers, rule


@rule("BatchNormalization")
def batch_norm(flow: Flow, node: ir.Node) -> None:
    """`x[b,c,*s], scale[c], bias[c], mean[c], var[c] -> y[b,c,*s]`: exact, each channel by itself."""
    x = flow.of(node.inputs[0])
    for parameter in node.inputs[1:]:
        flow.tie(flow.of(parameter)[0] if flow.of(parameter) else None, x[1] if len(x) > 1 else None)
    for output in node.outputs[1:]:
        flow.give(output, x[1:2])
    flow.give(node.outputs[0], x)


@rule("InstanceNormalization")
def instance_norm(flow: Flow, node: ir.Node) -> None:
    """`x[b,c,*s], scale[c], bias[c] -> y[b,c,*s]`: exact, each channel by itself; the space it averages over locks."""
    x = flow.of(node.inputs[0])
    flow.lock_all(x[2:], "InstanceNormalization averages over it")
    for parameter in node.inputs[1:]:
        flow.tie(flow.of(parameter)[0] if flow.of(parameter) else None, x[1])
    flow.give(node.outputs[0], x[:2] + (None,) * (len(x) - 2))


@rule("LayerNormalization", "RMSNormalization", "com.microsoft::SimplifiedLayerNormalization")
def layer_norm(flow: Flow, node: ir.Node) -> None:
    """`x[*b,*n], scale[*n], bias[*n] -> y[*b,*n]`: mixes the axes n, so a cut there is inexact."""
    x = flow.of(node.inputs[0])
    first = integer(node, "axis", -1) % max(len(x), 1)
    for parameter in node.inputs[1:]:
        sizes = flow.shape(parameter) or ()
        for axis in range(-len(sizes), 0):
            if sizes[axis] != 1:
                flow.tie(flow.of(parameter)[axis], x[axis])
    for vector in x[first:]:
        flow.inexact(vector)
    flow.give(node.outputs[0], x)


@rule("LRN")
def local_response(flow: Flow, node: ir.Node) -> None:
    """`x[b,c,*s] -> y[b,c,*s]`: sums over neighbouring channels, so a cut is inexact."""
    x = flow.of(node.inputs[0])
    flow.inexact(x[1])
    flow.give(node.outputs[0], x)


@rule("LpNormalization", "Softmax", "LogSoftmax", "Hardmax", "CumSum")
def along_axis(flow: Flow, node: ir.Node) -> None:
    """`x -> y` of the same shape, mixing one axis: that axis can't be cut."""
    x = flow.of(node.inputs[0])
    named = flow.ints(node, 1) if node.op_type == "CumSum" else [integer(node, "axis", -1)]
    if not named:
        return flow.lock_all(x, "it is summed along an axis that isn't constant")
    axis = named[0] % max(len(x), 1)
    flow.lock(x[axis], f"{node.op_type} works along it", node.inputs[0])
    flow.give(node.outputs[0], [None if i == axis else vector for i, vector in enumerate(x)])


EXACT = ("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2")
MIXING = ("ReduceMean",)
LOCKING = ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSum", "ReduceLogSumExp", "ArgMax", "ArgMin")


@rule(*EXACT, *MIXING, *LOCKING)
def reduce(flow: Flow, node: ir.Node) -> None:
    """`x[*kept,*gone] -> y[*kept]`: a sum over a cut axis is exact, a mean inexact, anything else locks it."""
    x = flow.of(node.inputs[0])
    axes = reduced_axes(flow, node, len(x))
    if axes is None:
        return flow.lock_all(x, "it is reduced along axes that aren't constant")
    for axis in axes:
        if node.op_type in MIXING:
            flow.inexact(x[axis])
        elif node.op_type in LOCKING:
            flow.lock(x[axis], f"{node.op_type} works along it", node.inputs[0])
    keep = integer(node, "keepdims", 1)
    vectors: list[Vector] = [
        None if axis in axes else vector for axis, vector in enumerate(x) if keep or axis not in axes
    ]
    flow.give(node.outputs[0], vectors)


def reduced_axes(flow: Flow, node: ir.Node, rank: int) -> set[int] | None:
    """The axes that a reduction removes; None when they are computed."""
    if node.op_type.startswith("Arg"):
        return {integer(node, "axis", 0) % rank}
    axes = integers(node, "axes")
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        axes = flow.ints(node, 1)
        if axes is None:
            return None
    if not axes:
        return set() if integer(node, "noop_with_empty_axes", 0) else set(range(rank))
    return {axis % rank for axis in axes}
