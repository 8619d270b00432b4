"""Quantised models as they stand: scales and zero points go with their axis, packed weights go by rows and blocks."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxprune.labels.convolution import conv
from onnxprune.labels.flow import Flow, given, integer, rule
from onnxprune.labels.linear import lock_operands, matmul
from onnxprune.labels.resizing import Cut, resize

BOTH = ("QuantizeLinear", "DequantizeLinear", "com.microsoft::QuantizeLinear", "com.microsoft::DequantizeLinear")


@rule(*BOTH)
def quantize(flow: Flow, node: ir.Node) -> None:
    """`x, scale, zero -> y` of the same shape; scale and zero are numbers, or go along an axis, by one or by block."""
    x = flow.of(node.inputs[0])
    axis = integer(node, "axis", 1) % max(len(x), 1)
    for value in node.inputs[1:]:
        scales = flow.of(value)
        if len(scales) == 1 and (flow.shape(value) or ())[0] != 1:
            flow.tie(scales[0], x[axis])
        elif len(scales) > 1:
            for other, blocks in enumerate(scales):
                size = integer(node, "block_size", 1) if other == axis else 1
                flow.tie(None if blocks is None else np.repeat(blocks, size), x[other], "it is quantised in blocks")
    flow.give(node.outputs[0], x)


@rule("DynamicQuantizeLinear")
def quantize_by_range(flow: Flow, node: ir.Node) -> None:
    """`x -> y, scale, zero` of the same shape: exact, since the range includes zero, and so what is masked."""
    flow.give(node.outputs[0], flow.of(node.inputs[0]))


@rule("MatMulInteger", "ConvInteger")
def integer_product(flow: Flow, node: ir.Node) -> None:
    """`x, w, zero of x, zeros of w[o] -> y[...,o,...]`, otherwise as MatMul and Conv."""
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is None or source.op_type not in ("QuantizeLinear", "DynamicQuantizeLinear"):
        return lock_operands(flow, node, "it is an integer whose zero is a number of its own")
    (matmul if node.op_type == "MatMulInteger" else conv)(flow, node)
    out = flow.axes.get(node.outputs[0], (None,) * 4)[-1 if node.op_type == "MatMulInteger" else 1]
    for value in node.inputs[2:]:
        for vector, size in zip(flow.of(value), flow.shape(value) or (), strict=True):
            if size != 1:
                flow.tie(vector, out)


@rule("com.microsoft::MatMulNBits")
def packed_matmul(flow: Flow, node: ir.Node) -> None:
    """`a[*b,(n s)], w[o,n,bytes], scales[(o n)], zeros[(o m)], order, bias[o] -> y[*b,o]`: k is cut by blocks n."""
    a, w = flow.of(node.inputs[0]), flow.of(node.inputs[1])
    shape, block = flow.shape(node.inputs[1]), integer(node, "block_size", 0)
    if not a or len(w) != 3 or shape is None or given(node, 4) is not None or None in shape:
        return lock_operands(flow, node, "the layout of this MatMulNBits isn't understood")
    flow.lock(w[2], "packed numbers stay together")
    out, blocks = w[0], w[1]
    whole = integer(node, "K", 0) == (shape[1] or 0) * block
    for index in (2, 3):
        value = given(node, index)
        if value is None:
            continue
        axes, sizes = flow.of(value), flow.shape(value) or ()
        per_row = int(np.prod([size or 0 for size in sizes])) // (shape[0] or 1)
        if len(axes) == 1:
            flow.lock(blocks, "the scales of its blocks are stored in one axis with the rows")
            flow.tie(axes[0], None if out is None else np.repeat(out, per_row))
        else:  # the zeros of several blocks may share a byte
            flow.tie(axes[0], out)
            bytes_of = None if axes[1] is None else np.repeat(axes[1], -(-(shape[1] or 1) // per_row))
            flow.tie(None if bytes_of is None else bytes_of[: shape[1]], blocks, "packed numbers stay together")
    if (bias := given(node, 5)) is not None:
        flow.tie(flow.of(bias)[0], out)
    inner = np.repeat(blocks, block) if whole and blocks is not None else None
    flow.tie(a[-1], inner, "it is multiplied with packed weights whose blocks can't be cut")
    if inner is None:
        flow.lock(blocks, "packed numbers stay together")
    flow.give(node.outputs[0], (*a[:-1], out))


@resize("com.microsoft::MatMulNBits")
def resize_packed_matmul(cut: Cut, node: ir.Node) -> None:
    """K and N are attributes."""
    for name, axis in (("N", 0), ("K", 1)):
        factor = 1 if axis == 0 else integer(node, "block_size", 1)
        if cut.axes(node.inputs[1])[axis] is not None and cut.size(node.inputs[1], axis) != cut.size_before(
            node.inputs[1], axis
        ):
            node.attributes[name] = ir.AttrInt64(name, cut.size(node.inputs[1], axis) * factor)
