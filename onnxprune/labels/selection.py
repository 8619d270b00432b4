"""Operators that join, cut out or pick positions along an axis."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir

from onnxprune.graph.model import constant
from onnxprune.labels.flow import Flow, Vector, given, integer, rule, text
from onnxprune.labels.resizing import Cut, resize


@rule("Concat")
def concat(flow: Flow, node: ir.Node) -> None:
    """`x[...,a,...], y[...,b,...] -> z[...,(a+b),...]`: along the axis labels are joined, the other axes are tied."""
    values = [value for value in node.inputs if value is not None]
    axes = [flow.of(value) for value in values]
    rank = max((len(vectors) for vectors in axes), default=0)
    if any(len(vectors) != rank for vectors in axes) or not rank:
        for vectors in axes:
            flow.lock_all(vectors, "the shape of an operand of this Concat is unknown")
        return
    at = integer(node, "axis", 0) % rank
    result: list[Vector] = []
    for axis in range(rank):
        along = [of[axis] for of in axes]
        if axis == at:
            result.append(_joined(flow, values, along, axis))
            continue
        if any(vector is not None for vector in along):
            for vector in along[1:]:
                flow.tie(along[0], vector, "another operand of this Concat can't be cut along this axis")
        result.append(None if any(vector is None for vector in along) else along[0])
    flow.give(node.outputs[0], result)


def _joined(flow: Flow, values: list[ir.Value], vectors: list[Vector], axis: int) -> Vector:
    """Labels side by side; operands that can't be cut get labels that are locked."""
    if all(vector is None for vector in vectors):
        return None
    parts = []
    for value, vector in zip(values, vectors, strict=True):
        size = (flow.shape(value) or ())[axis] if vector is None else len(vector)
        if size is None:
            flow.lock_all(vectors, "it is joined with a dynamic dimension")
            return None
        if vector is None:
            vector = flow.new(size)
            flow.lock(vector, "an operand of this Concat can't be cut", value)
        parts.append(vector)
    return np.concatenate(parts)


@rule("Split")
def split(flow: Flow, node: ir.Node) -> None:
    """`z[...,(a+b),...] -> x[...,a,...], y[...,b,...]`."""
    x = flow.of(node.inputs[0])
    shapes = [flow.shape(output) for output in node.outputs]
    if not x or any(shape is None for shape in shapes):
        return flow.lock_all(x, "the sizes of this Split are unknown")
    axis = integer(node, "axis", 0) % len(x)
    sizes = [shape[axis] for shape in shapes if shape is not None]
    whole = flow.fixed(node.inputs[0], axis)
    if whole is not None and (None in sizes or sum(size or 0 for size in sizes) != len(whole)):
        flow.lock(whole, "the sizes of this Split are unknown")
        whole = None
    edges = np.cumsum([0, *[size or 0 for size in sizes]])
    for output, (start, end) in zip(node.outputs, itertools.pairwise(edges), strict=True):
        part = None if whole is None else whole[start:end]
        if part is not None and len(part) == 1:
            flow.lock(part, "a part of this Split is a single position")
            part = None
        flow.give(output, [part if i == axis else vector for i, vector in enumerate(x)])


@resize("Split")
def resize_split(cut: Cut, node: ir.Node) -> None:
    """The sizes of the parts follow from what is left of each."""
    vectors = cut.axes(node.inputs[0])
    axis = integer(node, "axis", 0) % max(len(vectors), 1)
    if not vectors or vectors[axis] is None:
        return
    node.attributes.pop("num_outputs", None)
    cut.set_ints(node, 1, [cut.size(output, axis) for output in node.outputs])


@rule("Slice")
def slices(flow: Flow, node: ir.Node) -> None:
    """`x[...,a,...] -> x[...,a[start:end:step],...]`: the labels are sliced alike."""
    x = flow.of(node.inputs[0])
    bounds = slice_bounds(flow, node, len(x))
    if bounds is None:
        return flow.lock_all(x, "the bounds of this Slice are computed")
    result = list(x)
    for axis, where in bounds.items():
        vector = result[axis] = flow.fixed(node.inputs[0], axis)
        if vector is None:
            continue
        flow.end(vector)  # what isn't taken
        part = vector[where]
        if len(part) == 1:
            flow.lock(part, "this Slice takes a single position")
            result[axis] = None
        else:
            result[axis] = part
    flow.give(node.outputs[0], result)


def slice_bounds(flow: Flow, node: ir.Node, rank: int) -> dict[int, slice] | None:
    """The slice of each axis that a Slice node names; None when a bound is computed."""
    starts, ends, axes, steps = (flow.ints(node, index) for index in (1, 2, 3, 4))
    absent = [given(node, index) is None for index in (3, 4)]
    if starts is None or ends is None or (axes is None and not absent[0]) or (steps is None and not absent[1]):
        return None
    axes = axes if axes is not None else list(range(len(starts)))
    steps = steps if steps is not None else [1] * len(starts)
    return {
        axis % rank: slice(start, end, step) for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    }


@resize("Slice")
def resize_slice(cut: Cut, node: ir.Node) -> None:
    """Bounds move by what was removed before them."""
    vectors = cut.axes(node.inputs[0])
    starts, ends = cut.ints(node, 1), cut.ints(node, 2)
    if starts is None or ends is None or all(vector is None for vector in vectors):
        return
    axes, steps = cut.ints(node, 3) or list(range(len(starts))), cut.ints(node, 4) or [1] * len(starts)
    for i, axis in enumerate(axes):
        vector = vectors[axis % len(vectors)]
        step = steps[i]
        if vector is None:
            continue
        if step == 1:
            first, last, _ = slice(starts[i], ends[i]).indices(len(vector))
            starts[i], ends[i] = cut.kept_before(vector, first), cut.kept_before(vector, last)
        elif not cut.is_kept(vector).all():  # what is left of every other position is named one by one
            wanted = np.arange(len(vector))[starts[i] : ends[i] : step]
            kept = [cut.kept_before(vector, int(j)) for j in wanted if cut.is_kept(vector)[j]]
            cut.pick(node, axis % len(vectors), kept)
            starts[i], ends[i], steps[i] = 0, 2**31 - 1, 1
    cut.set_ints(node, 1, starts)
    cut.set_ints(node, 2, ends)
    if len(node.inputs) > 4:
        cut.set_ints(node, 4, steps)


@rule("Pad")
def pad(flow: Flow, node: ir.Node) -> None:
    """`x[...,a,...] -> y[...,(front+a+back),...]`: constant padding along a cut axis is new positions of its own."""
    x = flow.of(node.inputs[0])
    pads, axes = flow.ints(node, 1), flow.ints(node, 3)
    if pads is None or (axes is None and given(node, 3) is not None):
        return flow.lock_all(x, "the widths of this Pad are computed")
    axes = [axis % len(x) for axis in axes] if axes is not None else list(range(len(x)))
    result = list(x)
    for i, axis in enumerate(axes):
        front, back = pads[i], pads[i + len(axes)]
        if x[axis] is None or (front == 0 and back == 0):
            continue
        vector = result[axis] = flow.fixed(node.inputs[0], axis)
        if vector is None:
            continue
        flow.end(vector)  # what isn't taken
        if text(node, "mode", "constant") != "constant" or front < 0 or back < 0:
            flow.lock(vector, "this Pad isn't constant, or crops")
            result[axis] = None
            continue
        new = flow.new(front + back)
        result[axis] = np.concatenate([new[:front], vector, new[front:]])
    flow.give(node.outputs[0], result)


@resize("Pad")
def resize_pad(cut: Cut, node: ir.Node) -> None:
    """Padding along a cut axis shrinks to the padded positions that are left."""
    out, inside = cut.axes(node.outputs[0]), cut.axes(node.inputs[0])
    pads = cut.ints(node, 1)
    if pads is None or all(vector is None for vector in out):
        return
    axes = cut.ints(node, 3) or list(range(len(inside)))
    for i, axis in enumerate(axes):
        vector = out[axis % len(inside)]
        if vector is not None:
            front, back = pads[i], pads[i + len(axes)]
            pads[i] = cut.kept_before(vector, front)
            kept = cut.kept_before(vector, len(vector))
            pads[i + len(axes)] = kept - cut.kept_before(vector, len(vector) - back)
    cut.set_ints(node, 1, pads)


@rule("Gather")
def gather(flow: Flow, node: ir.Node) -> None:
    """`x[*a,n,*b], i[*m] -> y[*a,*m,*b]`: constant indices pick labels, computed ones lock the axis n."""
    x = flow.of(node.inputs[0])
    indices = flow.shape(node.inputs[1])
    if not x or indices is None:
        return flow.lock_all(x, "the shape of this Gather is unknown")
    axis = integer(node, "axis", 0) % len(x)
    picked, vector = constant(node.inputs[1]), flow.fixed(node.inputs[0], axis)
    middle: list[Vector] = [None] * len(indices)
    if vector is not None and picked is None:
        flow.lock(vector, "it is indexed by data")
    elif vector is not None and picked.ndim == 1 and picked.size > 1:
        middle = [vector[picked]]
    elif vector is not None:
        flow.lock(vector[picked.ravel()], "this position of it is picked")
    flow.give(node.outputs[0], [*x[:axis], *middle, *x[axis + 1 :]])


@resize("Gather")
def resize_gather(cut: Cut, node: ir.Node) -> None:
    """Constant indices into a cut axis: those of removed positions go, the others move up."""
    vectors, picked = cut.axes(node.inputs[0]), constant(node.inputs[1])
    vector = vectors[integer(node, "axis", 0) % max(len(vectors), 1)] if vectors else None
    if vector is not None and picked is not None:
        kept = [int(i) % len(vector) for i in picked.ravel() if cut.is_kept(vector)[i]]
        cut.set_ints(node, 1, [cut.kept_before(vector, i) for i in kept])


@rule("GatherElements", "ScatterElements", "Scatter")
def elements(flow: Flow, node: ir.Node) -> None:
    """`x[*a,n,*b], i[*a,m,*b], updates[*a,m,*b] -> y`: the axis n is indexed by data, the others are tied."""
    x, axis = flow.of(node.inputs[0]), integer(node, "axis", 0)
    sizes = flow.shape(node.inputs[0]) or ()
    result: list[Vector] = list(x)
    for value in node.inputs[1:]:
        for other, (vector, size) in enumerate(zip(flow.of(value), flow.shape(value) or (), strict=True)):
            if other == axis % len(x) or size != sizes[other]:
                flow.lock(vector, "it is indexed by data")
                flow.lock(x[other], "it is indexed by data")
                result[other] = None
            else:
                flow.tie(vector, x[other], "its elements are indexed one by one")
                result[other] = None if vector is None else result[other]
    flow.give(node.outputs[0], result)


@rule("GatherND")
def gather_nd(flow: Flow, node: ir.Node) -> None:
    """`x[*n,*b], i[*m,k] -> y[*m,*b]`: the axes that are indexed stay, the others pass."""
    x, shape, batch = flow.of(node.inputs[0]), flow.shape(node.inputs[1]), integer(node, "batch_dims", 0)
    if not x or not shape or shape[-1] is None:
        return flow.lock_all(x, "the shape of this GatherND is unknown")
    indexed = batch + shape[-1]
    flow.lock_all((*x[:indexed], *flow.of(node.inputs[1])), "it is indexed by data")
    flow.give(node.outputs[0], [*[None] * (len(shape) - 1), *x[indexed:]])


@rule("ScatterND")
def scatter_nd(flow: Flow, node: ir.Node) -> None:
    """`x[*n,*b], i[*m,k], updates[*m,*b] -> y[*n,*b]`: the axes that are indexed stay, the others are tied."""
    x, shape = flow.of(node.inputs[0]), flow.shape(node.inputs[1])
    updates = flow.of(node.inputs[2])
    if not x or not shape or shape[-1] is None:
        return flow.lock_all((*x, *updates), "the shape of this ScatterND is unknown")
    indexed, lead = shape[-1], len(shape) - 1
    flow.lock_all((*x[:indexed], *updates[:lead], *flow.of(node.inputs[1])), "it is indexed by data")
    for vector, other in zip(x[indexed:], updates[lead:], strict=True):
        flow.tie(vector, other, "what is scattered into it can't be cut")
    flow.give(node.outputs[0], [*[None] * indexed, *x[indexed:]])


@rule("TopK")
def top(flow: Flow, node: ir.Node) -> None:
    """`x[*a,n,*b], k -> values[*a,k,*b], indices[*a,k,*b]`: the axis n is sorted, the others pass."""
    x = flow.of(node.inputs[0])
    axis = integer(node, "axis", -1) % max(len(x), 1)
    flow.lock(x[axis], "TopK sorts along it", node.inputs[0])
    for output in node.outputs:
        flow.give(output, [None if i == axis else vector for i, vector in enumerate(x)])


@rule("Trilu")
def triangle(flow: Flow, node: ir.Node) -> None:
    """`x[*b,i,j] -> y[*b,i,j]`, zero on one side of the diagonal: positions of the last two axes stay."""
    x = flow.of(node.inputs[0])
    flow.lock_all(x[-2:], "Trilu compares its positions")
    flow.give(node.outputs[0], (*x[:-2], None, None))


@rule("ReverseSequence")
def reverse(flow: Flow, node: ir.Node) -> None:
    """`x[t,b,*c], lengths[b] -> y[t,b,*c]`: time and batch stay, the others pass."""
    x, named = flow.of(node.inputs[0]), (integer(node, "time_axis", 0), integer(node, "batch_axis", 1))
    flow.lock_all([x[axis] for axis in named], "ReverseSequence names its positions")
    flow.give(node.outputs[0], [None if axis in named else vector for axis, vector in enumerate(x)])
