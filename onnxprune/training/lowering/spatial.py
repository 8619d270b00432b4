"""Operators over positions: resizing and pooling as matrices, transposed convolutions as convolutions."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.evaluating.evaluate import relative_difference, run_model
from onnxprune.graph.model import constant
from onnxprune.labels.flow import integer, integers
from onnxprune.training.lowering.base import Lowerer, first, lowering

Array = NDArray[np.float32]
NUMBERS = 2**24  # elements of what an operator is tried on at a time
EQUAL = 1e-4
FEW = 4096  # positions before times after


@lowering("AveragePool", "Resize")
def _separable(lower: Lowerer, node: ir.Node) -> None:
    """The product with a matrix along every axis that it changes: what it makes of the unit vectors there."""
    x = first(node)
    before, after = lower.sizes(node, x), lower.sizes(node, node.outputs[0])
    pool = node.op_type == "AveragePool"
    axes = [axis for axis in range(len(before)) if (pool and axis > 1) or (not pool and before[axis] != after[axis])]
    for axis, matrix in zip(axes, _matrices(lower, node, before, after, axes), strict=True):
        x = lower.along_axis(node, x, len(before), axis, matrix)
    lower.replace_by(node, x)


def _matrices(lower: Lowerer, node: ir.Node, before: list[int], after: list[int], axes: list[int]) -> list[Array]:
    """A matrix (new size, old size) for each axis, whose products are the operator; checked on random numbers.

    With unit vectors along one axis and ones along the others the operator gives that axis' matrix, times what it makes
    of ones along the others.
    """
    free = next((axis for axis in range(len(before)) if axis not in axes), None)
    if free is None:
        raise lower.refusal(node, "it changes all axes")
    space = [size if axis in axes else 1 for axis, size in enumerate(before)]
    target = [size if axis in axes else 1 for axis, size in enumerate(after)]
    whole = _run(node, np.ones(space, np.float32), target)
    at = np.unravel_index(np.abs(whole).argmax(), whole.shape)
    if not axes or whole[at] == 0:
        return []
    found = []
    for axis in axes:
        columns = []
        chunk = max(1, NUMBERS // max(math.prod(space), math.prod(target)))
        for start in range(0, before[axis], chunk):
            units = np.eye(before[axis], dtype=np.float32)[start : start + chunk]
            along = [1] * len(before)
            along[free], along[axis] = units.shape
            made = _run(node, np.ones(space, np.float32) * units.reshape(along), target)
            where = tuple(slice(None) if k in (axis, free) else i for k, i in enumerate(at))
            rows = made[where]
            columns.append(rows if free < axis else rows.T)
        found.append(np.concatenate(columns).T)
    found[0] = found[0] / whole[at] ** (len(axes) - 1)
    noise = np.random.default_rng(0).standard_normal(space).astype(np.float32)
    product = noise
    for axis, matrix in zip(axes, found, strict=True):
        product = np.moveaxis(np.tensordot(matrix, product, (1, axis)), 0, axis)
    if relative_difference(_run(node, noise, target), product) > EQUAL:
        raise lower.refusal(node, "it isn't linear along each axis")
    return [np.ascontiguousarray(matrix, dtype=np.float32) for matrix in found]


def _run(node: ir.Node, array: Array, target: list[int]) -> Array:
    """What the operator makes of an array: its sizes and scales hold for the axes that are not 1 there."""
    size = [max(a, b) for a, b in zip(array.shape, target, strict=True)]
    x = ir.Value(name="x", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
    inputs: list[ir.Value | None] = [x]
    initializers = []
    for index, value in enumerate(node.inputs[1:], 1):
        numbers = constant(value)
        if value is not None and index == 3:  # the sizes of Resize, of all axes or of some
            some = integers(node, "axes") or range(len(size))
            numbers = np.array([target[axis] if target[axis] > 1 else array.shape[axis] for axis in some], np.int64)
        elif value is not None and index == 2 and numbers is not None and numbers.size == len(target):
            changed = [t != 1 or s != 1 for s, t in zip(array.shape, target, strict=True)]
            numbers = np.where(np.array(changed) & (numbers != 1), numbers, 1).astype(np.float32)
        if value is None or numbers is None or not numbers.size:
            inputs.append(None)
            continue
        tensor = ir.tensor(numbers, name=f"c{index}")
        made = ir.Value(name=f"c{index}", shape=ir.Shape(numbers.shape), const_value=tensor)
        made.type = ir.TensorType(tensor.dtype)
        initializers.append(made)
        inputs.append(made)
    twin = ir.Node("", node.op_type, inputs, node.attributes.values(), num_outputs=1, name="twin")
    twin.outputs[0].name = "y"
    assert node.graph is not None
    graph = ir.Graph(
        [x], twin.outputs, nodes=[twin], initializers=initializers, opset_imports=node.graph.opset_imports, name="one"
    )
    return run_model(ir.Model(graph, ir_version=8), {"x": array})[0]


@lowering("ConvTranspose")
def _transposed_convolution(lower: Lowerer, node: ir.Node) -> None:
    """A convolution, with the mirrored weight, over the input with zeros between its positions."""
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None
    before, after, shape = (lower.sizes(node, v) for v in (x, node.outputs[0], weight))
    kernel, space, group = shape[2:], len(shape) - 2, integer(node, "group", 1)
    strides, dilations = (integers(node, name) or [1] * space for name in ("strides", "dilations"))
    begins = _pads_in_front(node, before[2:], after[2:], kernel, strides, dilations)
    for axis in range(space):
        x = _spread(lower, node, x, before, axis, strides[axis])
        before = [*before[: axis + 2], before[axis + 2] * strides[axis], *before[axis + 3 :]]
    pads, cuts = [], []
    for axis in range(space):
        span = (kernel[axis] - 1) * dilations[axis]
        front = span - begins[axis]
        back = after[axis + 2] - 1 + span + 1 - front - before[axis + 2]
        pads.append((max(front, 0), max(back, 0)))
        cuts.append((max(-front, 0), before[axis + 2] - max(-back, 0)))
    axes = list(range(2, space + 2))
    if any(cut != (0, size) for cut, size in zip(cuts, before[2:], strict=True)):
        starts, ends = (lower.integers(node, *(cut[i] for cut in cuts)) for i in (0, 1))
        x = lower.add(node, "Slice", [x, starts, ends, lower.integers(node, *axes)])
    inputs = [x, _mirrored(lower, node, weight, shape, group)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        inputs.append(node.inputs[2])
    lower.replace(
        node, "Conv", inputs, group=group, kernel_shape=kernel, dilations=dilations, strides=[1] * space,
        pads=[p[0] for p in pads] + [p[1] for p in pads],
    )  # fmt: skip


def _pads_in_front(
    node: ir.Node, before: list[int], after: list[int], kernel: list[int], strides: list[int], dilations: list[int]
) -> list[int]:
    """The padding at the begin of each axis, which output_shape and auto_pad leave to be found."""
    kind = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if kind == "NOTSET" and not integers(node, "output_shape"):
        return (integers(node, "pads") or [0] * 2 * len(kernel))[: len(kernel)]
    if kind == "VALID":
        return [0] * len(kernel)
    extra = integers(node, "output_padding") or [0] * len(kernel)
    totals = [
        max(0, strides[i] * (before[i] - 1) + extra[i] + (kernel[i] - 1) * dilations[i] + 1 - after[i])
        for i in range(len(kernel))
    ]
    return [total // 2 if kind == "SAME_UPPER" else total - total // 2 for total in totals]


def _spread(lower: Lowerer, node: ir.Node, x: ir.Value, shape: list[int], axis: int, stride: int) -> ir.Value:
    """Zeros behind every position along a spatial axis."""
    if stride == 1:
        return x
    at, rank = axis + 2, len(shape)
    lifted = lower.reshape(node, x, *shape[: at + 1], 1, *shape[at + 1 :])
    pads = [0] * (2 * (rank + 1))
    pads[rank + 1 + at + 1] = stride - 1
    padded = lower.add(node, "Pad", [lifted, lower.integers(node, *pads), lower.number(node, 0)])
    return lower.reshape(node, padded, *shape[:at], shape[at] * stride, *shape[at + 1 :])


def _mirrored(lower: Lowerer, node: ir.Node, weight: ir.Value, shape: list[int], group: int) -> ir.Value:
    """From (in, out / group, kernel …) to (out, in / group, mirrored kernel …)."""
    inner, outer, kernel = shape[0] // group, shape[1], shape[2:]
    parts = lower.reshape(node, weight, group, inner, outer, *kernel)
    turned = lower.add(node, "Transpose", [parts], perm=[0, 2, 1, *range(3, 3 + len(kernel))])
    result = lower.reshape(node, turned, group * outer, inner, *kernel)
    for axis, size in enumerate(kernel, 2):
        if size > 1:
            result = lower.add(node, "Gather", [result, lower.integers(node, *reversed(range(size)))], axis=axis)
    return result


@lowering("Conv")
def _depthwise(lower: Lowerer, node: ir.Node) -> None:
    """Where a depthwise convolution has few positions: a product with a matrix for each channel.

    It has a gradient as it is, for which ONNX Runtime makes columns of every channel of every sample, one by one: those
    of few positions were a third of the time of training a MobileNetV2.
    """
    x, weight = node.inputs[:2]
    assert x is not None and weight is not None
    shape = lower.shapes(weight)
    if shape is None or integer(node, "group", 1) != shape[0] or shape[1] != 1 or shape[0] == 1:
        return
    before, after = lower.sizes(node, x), lower.sizes(node, node.outputs[0])
    places, made, channels = math.prod(before[2:]), math.prod(after[2:]), before[1]
    if before[1] != shape[0] or places * made > FEW:
        return
    taps = lower.constant(node, _taps(node, before[2:], after[2:], lower.sizes(node, weight)[2:]))
    matrices = lower.add(node, "MatMul", [lower.reshape(node, weight, channels, -1), taps])
    matrices = lower.reshape(node, matrices, channels, places, made)
    rows = lower.add(node, "Transpose", [lower.reshape(node, x, before[0], channels, places)], perm=[1, 0, 2])
    product = lower.add(node, "MatMul", [rows, matrices])
    result = lower.reshape(node, lower.add(node, "Transpose", [product], perm=[1, 0, 2]), *after)
    if len(node.inputs) > 2 and (bias := node.inputs[2]) is not None:
        result = lower.add(node, "Add", [result, lower.reshape(node, bias, channels, *[1] * (len(after) - 2))])
    lower.replace_by(node, result)


def _taps(node: ir.Node, before: list[int], after: list[int], kernel: list[int]) -> Array:
    """Which position of the input each position of the output reads by each weight of the kernel.

    Of shape (weights, positions before times after); the same for every channel.
    """
    strides, dilations = (integers(node, name) or [1] * len(kernel) for name in ("strides", "dilations"))
    kind = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    result = np.ones((1, 1, 1), np.float32)
    for axis, size in enumerate(kernel):
        missing = max((after[axis] - 1) * strides[axis] + (size - 1) * dilations[axis] + 1 - before[axis], 0)
        begin = (missing + (kind == "SAME_LOWER")) // 2 if kind.startswith("SAME") else 0
        if kind == "NOTSET" and (pads := integers(node, "pads")):
            begin = pads[axis]
        tap, place, made = np.ogrid[:size, : before[axis], : after[axis]]
        reads = (place == made * strides[axis] + tap * dilations[axis] - begin).astype(np.float32)
        result = np.einsum("tpq,uvw->tupvqw", result, reads)
        result = result.reshape(-1, result.shape[2] * result.shape[3], result.shape[4] * result.shape[5])
    return np.ascontiguousarray(result.reshape(len(result), -1))


@lowering("DepthToSpace", "SpaceToDepth")
def _blocks(lower: Lowerer, node: ir.Node) -> None:
    """Two reshapes around a transposition."""
    x, size = first(node), integer(node, "blocksize", 1)
    n, c, h, w = lower.sizes(node, x)
    if node.op_type == "SpaceToDepth":
        parts = lower.reshape(node, x, n, c, h // size, size, w // size, size)
        turned = lower.add(node, "Transpose", [parts], perm=[0, 3, 5, 1, 2, 4])
        lower.replace_by(node, lower.reshape(node, turned, n, c * size * size, h // size, w // size))
        return
    crd = "mode" in node.attributes and node.attributes["mode"].as_string() == "CRD"
    thin = c // size**2
    split = [n, thin, size, size, h, w] if crd else [n, size, size, thin, h, w]
    order = [0, 1, 4, 2, 5, 3] if crd else [0, 3, 4, 1, 5, 2]
    turned = lower.add(node, "Transpose", [lower.reshape(node, x, *split)], perm=order)
    lower.replace_by(node, lower.reshape(node, turned, n, thin, h * size, w * size))
