"""Convolutions and pooling over (N, C, *space)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxprune.labels.flow import Flow, Vector, given, integer, integers, rule
from onnxprune.labels.resizing import Cut, resize

SPACE = "a spatial axis"


@rule("Conv", "com.microsoft::FusedConv")
def conv(flow: Flow, node: ir.Node) -> None:
    """`x[b,(g i),*s], w[(g o),i,*k], b[(g o)] -> y[b,(g o),*s']`; a fused sum `[b,(g o),*s']` may follow.

    Where channels lie along s and keep their number, they pass: inexactly where each reads its neighbours.
    """
    x, w = flow.of(node.inputs[0]), flow.of(node.inputs[1])
    sizes = flow.shape(node.inputs[1])
    if not sizes or len(w) < 3 or len(x) < 3 or sizes[0] is None or sizes[1] is None:
        return unknown_weight(flow, node)
    flow.lock_all(w[2:], SPACE)
    out = _channels_out(flow, x[1], w[0], w[1], integer(node, "group", 1), (sizes[1], sizes[0]))
    _finish(flow, node, x, out, _along_space(flow, node, x))


def _along_space(flow: Flow, node: ir.Node, x: tuple[Vector, ...]) -> list[Vector]:
    """The labels of the spatial axes behind a convolution: what is slid over one by one passes, the rest locks."""
    before, after, steps = flow.sizes(node.inputs[0]), flow.sizes(node.outputs[0]), integers(node, "strides") or []
    kernel = flow.sizes(node.inputs[1]) or ()
    result: list[Vector] = [None] * (len(x) - 2)
    for axis, vector in enumerate(x[2:]):
        same = before is not None and after is not None and before[axis + 2] == after[axis + 2]
        if same and set(steps) <= {1}:
            if kernel[axis + 2] > 1:
                flow.inexact(vector)
            result[axis] = vector
        else:
            flow.lock(vector, SPACE)
    return result


@rule("ConvTranspose")
def conv_transpose(flow: Flow, node: ir.Node) -> None:
    """`x[b,(g i),*s], w[(g i),o,*k], b[(g o)] -> y[b,(g o),*s']`."""
    x, w = flow.of(node.inputs[0]), flow.of(node.inputs[1])
    sizes, groups = flow.shape(node.inputs[1]), integer(node, "group", 1)
    if not sizes or len(w) < 3 or len(x) < 3 or sizes[0] is None or sizes[1] is None:
        return unknown_weight(flow, node)
    flow.lock_all(w[2:], SPACE)
    flow.lock_all(x[2:], SPACE)
    flow.tie(x[1], w[0], "the input of this convolution can't be cut")
    if groups == 1:
        out = w[1]
    elif sizes[1] == 1 and sizes[0] == groups:
        out = x[1]
    else:
        inner = flow.fresh(sizes[0] // groups)
        rows = flow.fresh(groups)
        flow.rectangle(x[1], (rows, inner), (groups, sizes[0] // groups), prefer=1)
        out = flow.fresh(sizes[1] * groups)
        flow.rectangle(out, (rows, w[1]), (groups, sizes[1]), prefer=1)
        flow.lock(inner, "a row of a grouped transposed convolution's weight")
    _finish(flow, node, x, out)


def _channels_out(flow: Flow, x: Vector, w0: Vector, w1: Vector, groups: int, sizes: tuple[int, int]) -> Vector:
    """The labels of the output channels of a convolution whose weight has `sizes` = (inputs per group, outputs)."""
    inputs, outputs = sizes
    if groups == 1:
        flow.tie(x, w1, "the input of this convolution can't be cut")
        return w0
    if inputs == 1:  # depthwise: output (g o) goes with input g
        repeated = None if x is None else np.repeat(x, outputs // groups)
        flow.tie(repeated, w0, "the input of this depthwise convolution can't be cut")
        return repeated
    rows = flow.fresh(groups) if x is not None else None
    flow.rectangle(x, (rows, w1), (groups, inputs), prefer=1)
    columns = flow.fresh(outputs // groups)
    flow.rectangle(w0, (rows, columns), (groups, outputs // groups), prefer=1)
    return w0


def _finish(
    flow: Flow, node: ir.Node, x: tuple[Vector, ...], out: Vector, space: Sequence[Vector] | None = None
) -> None:
    if (bias := given(node, 2)) is not None and node.op_type != "ConvInteger":
        flow.tie(flow.of(bias)[0] if flow.of(bias) else None, out)
    if (added := given(node, 3)) is not None and node.op_type == "FusedConv":
        for vector, other in zip(flow.of(added)[:2], (x[0], out), strict=True):
            flow.tie(vector, other)
    flow.give(node.outputs[0], (x[0], out, *(space or [None] * (len(x) - 2))))


def unknown_weight(flow: Flow, node: ir.Node) -> None:
    """Locks every operand of a node whose weight has no known shape."""
    for value in node.inputs:
        flow.lock_all(flow.of(value), "the shapes of this convolution's operands are unknown")


@rule("DeformConv")
def deformable(flow: Flow, node: ir.Node) -> None:
    """`x[b,i,*s], w[o,i,*k], offset, bias[o], mask -> y[b,o,*s']`, the same offsets for all channels."""
    x, w = flow.of(node.inputs[0]), flow.of(node.inputs[1])
    if len(w) < 3 or integer(node, "group", 1) > 1 or integer(node, "offset_group", 1) > 1:
        return unknown_weight(flow, node)
    flow.lock_all((*w[2:], *x[2:]), SPACE)
    flow.tie(x[1], w[1], "the input of this convolution can't be cut")
    for index in (2, 4):
        flow.lock_all(flow.of(given(node, index)), "offsets are read as they are")
    if (bias := given(node, 3)) is not None:
        flow.tie(flow.of(bias)[0], w[0])
    flow.give(node.outputs[0], (None, w[0], None, None))


@rule("GridSample", "RoiAlign", "MaxRoiPool")
def sample(flow: Flow, node: ir.Node) -> None:
    """`x[b,c,*s], where, … -> y[b',c,*s']`: each channel by itself."""
    x = flow.of(node.inputs[0])
    flow.lock_all((x[0], *x[2:]), SPACE)
    for value in node.inputs[1:]:
        flow.lock_all(flow.of(value), "it says where to sample")
    flow.give(node.outputs[0], (None, x[1]) + (None,) * (len(x) - 2))


@resize("Conv", "ConvTranspose", "ConvInteger", "com.microsoft::FusedConv")
def resize_group(cut: Cut, node: ir.Node) -> None:
    """The number of groups follows from the channels that are left."""
    if (groups := integer(node, "group", 1)) > 1:
        before, after = cut.size_before(node.inputs[0], 1), cut.size(node.inputs[0], 1)
        per_group = before // groups if node.op_type == "ConvTranspose" else cut.size(node.inputs[1], 1)
        node.attributes["group"] = ir.AttrInt64("group", after // per_group)


@rule("MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool")
def pool(flow: Flow, node: ir.Node) -> None:
    """`x[b,c,*s] -> y[b,c,*s']`."""
    x = flow.of(node.inputs[0])
    flow.lock_all(x[2:], SPACE)
    vectors = x[:2] + (None,) * max(len(x) - 2, 0)
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        flow.lock(x[1], "MaxPool's indices count channels")
    flow.give(node.outputs[0], vectors)


@rule("Resize", "Upsample")
def resample(flow: Flow, node: ir.Node) -> None:
    """`x[b,c,*s], roi, scales, sizes -> y[b,c,*s']`: axes that keep their size pass, the others lock."""
    x, out = flow.of(node.inputs[0]), flow.shape(node.outputs[0])
    before = flow.shape(node.inputs[0])
    if out is None or before is None:
        return flow.lock_all(x, "the size of this Resize is unknown")
    same = [size is not None and size == other for size, other in zip(before, out, strict=True)]
    if given(node, 3) is not None and flow.ints(node, 3) is None:
        same = [False] * len(same)
    flow.lock_all([v for v, ok in zip(x, same, strict=True) if not ok], "this axis is resampled")
    flow.give(node.outputs[0], [v if ok else None for v, ok in zip(x, same, strict=True)])


@resize("Resize")
def resize_sizes(cut: Cut, node: ir.Node) -> None:
    """The `sizes` input names the channel count too."""
    sizes = cut.ints(node, 3)
    if sizes is not None and len(sizes) == len(cut.axes(node.outputs[0])):
        cut.set_ints(node, 3, [cut.size(node.outputs[0], axis, size) for axis, size in enumerate(sizes)])
