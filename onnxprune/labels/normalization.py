"""Normalisations, softmax and reductions. What mixes the positions of a cut axis is inexact, or locks it."""

from __future__ import annotations

import onnx_ir as ir

from onnxprune.labels.flow import Flow, Vector, integer, integers, rule
from onnxprune.labels.linear import lock_operands
from onnxprune.labels.reshaping import split
from onnxprune.labels.resizing import Cut, resize


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
    """`x[b,c,*s], scale[c], bias[c] -> y[b,c,*s]`: exact, each channel by itself, unless channels are folded into s."""
    x = flow.of(node.inputs[0])
    for vector in x[2:]:
        flow.inexact(vector)
    for parameter in node.inputs[1:]:
        flow.tie(flow.of(parameter)[0] if flow.of(parameter) else None, x[1])
    flow.give(node.outputs[0], x)


@rule("GroupNormalization")
def group_norm(flow: Flow, node: ir.Node) -> None:
    """`x[b,(g i),*s], scale, bias -> y[b,(g i),*s]`: exact for whole groups g, inexact inside them."""
    x, groups, sizes = flow.of(node.inputs[0]), integer(node, "num_groups", 1), flow.shape(node.inputs[0])
    if len(x) < 2 or sizes is None or sizes[1] is None:
        return lock_operands(flow, node, "the shape of an operand is unknown")
    for vector in x[2:]:
        flow.inexact(vector)
    rows, inner = split(flow, x[1], [groups, sizes[1] // groups])
    flow.inexact(inner)
    for parameter in node.inputs[1:]:  # one for each group until opset 20, one for each channel since
        flow.tie(flow.of(parameter)[0], x[1] if flow.shape(parameter) == sizes[1:2] else rows)
    flow.give(node.outputs[0], x)


@resize("GroupNormalization")
def resize_groups(cut: Cut, node: ir.Node) -> None:
    """The number of groups is an attribute."""
    vector, groups = cut.axes(node.inputs[0])[1], integer(node, "num_groups", 1)
    if vector is not None:
        kept = int(cut.is_kept(vector).reshape(groups, -1).any(1).sum())
        node.attributes["num_groups"] = ir.AttrInt64("num_groups", kept)


@rule("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
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


@rule("com.microsoft::SkipLayerNormalization", "com.microsoft::SkipSimplifiedLayerNormalization")
def skip_layer_norm(flow: Flow, node: ir.Node) -> None:
    """`x[*b,n], skip[*b,n], scale[n], bias[n], bias[n] -> y[*b,n], mean, deviation, x + skip + bias`: inexact."""
    x = flow.of(node.inputs[0])
    skip = flow.of(node.inputs[1])
    flow.lock_all(skip[:-1], "only the last axis is followed")
    for value in node.inputs[1:]:
        if value is not None:
            flow.tie(flow.of(value)[-1], x[-1])
    flow.inexact(x[-1])
    for index in (0, 3):
        if index < len(node.outputs) and node.outputs[index].name:
            flow.give(node.outputs[index], x)


@rule("com.microsoft::EmbedLayerNormalization")
def embed_layer_norm(flow: Flow, node: ir.Node) -> None:
    """`ids, segments, words[w,n], positions[p,n], segments[t,n], scale[n], bias[n] -> y[b,s,n], mask, sum`: inexact."""
    tables = [flow.of(value) for value in node.inputs[2:7] if value is not None]
    for axes in tables:
        flow.lock_all(axes[:-1], "it is indexed by data")
        flow.tie(axes[-1], tables[0][-1])
    flow.inexact(tables[0][-1])
    for index in (0, 2):
        if index < len(node.outputs) and node.outputs[index].name:
            flow.give(node.outputs[index], (None, None, tables[0][-1]))


@rule("MeanVarianceNormalization")
def mean_variance(flow: Flow, node: ir.Node) -> None:
    """`x -> y` of the same shape, with mean and variance over some axes: a cut of one of those is inexact."""
    x = flow.of(node.inputs[0])
    for axis in integers(node, "axes") or [0, 2, 3]:
        flow.inexact(x[axis])
    flow.give(node.outputs[0], x)


@rule("LpNormalization")
def lp_norm(flow: Flow, node: ir.Node) -> None:
    """`x -> x / |x|` along one axis: exact, since what is masked adds nothing to the norm."""
    flow.give(node.outputs[0], flow.of(node.inputs[0]))


@rule("Softmax", "LogSoftmax", "Hardmax", "CumSum", "CumProd")
def along_axis(flow: Flow, node: ir.Node) -> None:
    """`x -> y` of the same shape, mixing one axis: that axis can't be cut."""
    x = flow.of(node.inputs[0])
    named = flow.ints(node, 1) if node.op_type in ("CumSum", "CumProd") else [integer(node, "axis", -1)]
    if not named:
        return flow.lock_all(x, "it is summed along an axis that isn't constant")
    axis = named[0] % max(len(x), 1)
    flow.lock(x[axis], f"{node.op_type} works along it", node.inputs[0])
    flow.give(node.outputs[0], [None if i == axis else vector for i, vector in enumerate(x)])


EXACT = ("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum")
MIXING = ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceLogSumExp")
LOCKING = ("ReduceProd", "ArgMax", "ArgMin")


@rule(*EXACT, *MIXING, *LOCKING)
def reduce(flow: Flow, node: ir.Node) -> None:
    """`x[*kept,*gone] -> y[*kept]`: over a cut axis a sum is exact, a mean or maximum inexact; indices lock it."""
    x = flow.of(node.inputs[0])
    axes = reduced_axes(flow, node, len(x))
    if axes is None:
        return flow.lock_all(x, "it is reduced along axes that aren't constant")
    for axis in axes:
        flow.end(x[axis])
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
