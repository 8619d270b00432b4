"""Operators that rearrange axes without choosing among positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxprune.graph.model import constant
from onnxprune.labels.flow import Flow, Vector, integer, integers, rule
from onnxprune.labels.resizing import Cut, resize

Block = tuple[list[int], list[int]]  # axes before and axes after that hold the same elements
Pair = tuple[int, int]


@rule("Transpose")
def transpose(flow: Flow, node: ir.Node) -> None:
    """`x[a,b,...] -> y[perm]`."""
    x = flow.of(node.inputs[0])
    order = integers(node, "perm") or list(range(len(x)))[::-1]
    flow.give(node.outputs[0], [x[axis] for axis in order] if x else [])


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(flow: Flow, node: ir.Node) -> None:
    """`x -> y` with the same elements in the same order: axes are matched up in blocks that hold the same elements."""
    source, out = node.inputs[0], node.outputs[0]
    x, before, after = flow.of(source), flow.sizes(source), flow.sizes(out)
    assert source is not None
    pairs = blocks(flow.shapes.pairs(source), flow.shapes.pairs(out))
    if pairs is None or before is None or after is None or 0 in before:
        return flow.lock_all(x, "the target of this reshape can't be followed")
    named = target(node) if node.op_type == "Reshape" else [-1] * len(after)
    named = named if named is not None and len(named) == len(after) else None
    result: list[Vector] = [None] * len(after)
    for sources, targets in pairs:
        vectors = [x[axis] for axis in sources]
        if all(vector is None for vector in vectors):
            continue
        flat = merge(flow, vectors, [before[axis] for axis in sources])
        spans = flow.shapes.pairs(out)
        pure = [place for place, axis in enumerate(targets) if len(targets) > 1 and _purely_dynamic(spans[axis])]
        parts = split(flow, flat, [after[axis] for axis in targets], pure)
        for axis, vector in zip(targets, parts, strict=True):
            if vector is not None and (named is None or named[axis] is None):
                flow.lock(vector, "its size is computed in the target of this reshape")
            else:
                result[axis] = vector
    flow.give(out, result)


def target(node: ir.Node) -> list[int | None] | None:
    """What a Reshape's target names for each axis, None for a computed size; None for a target that can't be read.

    Computed targets are joined from parts of one number each, some of them constant, after normalising.
    """
    known = constant(node.inputs[1])
    if known is not None:
        return [int(dim) for dim in known]
    join = node.inputs[1].producer() if node.inputs[1] is not None else None
    if join is None or join.op_type != "Concat":
        return None
    named: list[int | None] = []
    for value in join.inputs:
        part = constant(value)
        if (part is None and not _reads_one_size(value)) or (part is not None and part.size != 1):
            return None
        named.append(None if part is None else int(part.reshape(-1)[0]))
    return named


def _reads_one_size(value: ir.Value | None) -> bool:
    """Whether a value is a single size, read off a shape."""
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "Shape" and integer(node, "end", -1) - integer(node, "start", 0) == 1


def blocks(before: Sequence[Pair], after: Sequence[Pair]) -> list[Block] | None:
    """Matches the axes of a reshape in the smallest blocks that hold the same elements.

    A size is a pair, its value in either walk, so that dynamic dimensions are matched like any other. None when the
    sizes don't multiply to the same.
    """
    found: list[Block] = []
    i = j = 0
    while i < len(before) or j < len(after):
        rows, columns = list(range(i, min(i + 1, len(before)))), list(range(j, min(j + 1, len(after))))
        left, right = _product(before, rows), _product(after, columns)
        while left != right:
            if left < right and rows[-1:] < [len(before) - 1]:
                rows.append(rows[-1] + 1 if rows else i)
            elif right < left and columns[-1:] < [len(after) - 1]:
                columns.append(columns[-1] + 1 if columns else j)
            else:
                return None
            left, right = _product(before, rows), _product(after, columns)
        found.append((rows, columns))
        i, j = i + len(rows), j + len(columns)
    return found


def _product(sizes: Sequence[Pair], axes: list[int]) -> Pair:
    return math.prod(sizes[axis][0] for axis in axes), math.prod(sizes[axis][1] for axis in axes)


def merge(flow: Flow, vectors: Sequence[Vector], sizes: Sequence[int]) -> Vector:
    """The labels of one axis that holds these axes row by row."""
    tracked = [axis for axis, vector in enumerate(vectors) if vector is not None]
    if not tracked:
        return None
    inner = vectors[tracked[0]]
    if len(tracked) > 1:
        inner = flow.fresh(math.prod(sizes[axis] for axis in tracked))
        flow.rectangle(inner, [vectors[axis] for axis in tracked], [sizes[axis] for axis in tracked])
    assert inner is not None
    shape = [size if axis in tracked else 1 for axis, size in enumerate(sizes)]
    return np.broadcast_to(inner.reshape(shape), sizes).ravel()


def _purely_dynamic(pair: Pair) -> bool:
    """Whether no fixed number of positions is folded into a dynamic dimension."""
    return pair[0] != pair[1] and math.gcd(*pair) == 1


def split(flow: Flow, flat: Vector, sizes: Sequence[int], whole: Sequence[int] = ()) -> list[Vector]:
    """The labels of the axes into which one axis is split, row by row; `whole` axes can't be cut."""
    if flat is None:
        return [None] * len(sizes)
    grid = flat.reshape(tuple(sizes))
    for axis in whole:
        first = np.broadcast_to(grid.take([0], axis), grid.shape)
        flow.ties.append((first.ravel(), grid.ravel()))
        grid = grid.take([0], axis)
    sizes = grid.shape
    varying = [axis for axis in range(len(sizes)) if not (grid == grid.take([0], axis)).all()]
    result: list[Vector] = [None] * len(sizes)
    if len(varying) == 1:
        result[varying[0]] = np.moveaxis(grid, varying[0], 0).reshape(sizes[varying[0]], -1)[:, 0]
    elif varying:
        base = grid[tuple(slice(None) if axis in varying else 0 for axis in range(len(sizes)))].ravel()
        for axis in varying:
            result[axis] = flow.fresh(sizes[axis])
        flow.rectangle(base, [result[axis] for axis in varying], [sizes[axis] for axis in varying])
    else:
        flow.lock(flat, "all of it is one unit")
    return result


@resize("Reshape")
def resize_target(cut: Cut, node: ir.Node) -> None:
    """The target names sizes; 0 and -1 stay."""
    resize_named(cut, node, (0, -1))


def resize_named(cut: Cut, node: ir.Node, stay: tuple[int, ...]) -> None:
    """Corrects the sizes, other than those that `stay`, that a target names, be it constant or joined from parts."""
    named, out = target(node), node.outputs[0]
    if named is None or (node.op_type == "Reshape" and len(named) != len(cut.axes(out))):
        return
    lead = len(cut.axes(out)) - len(named) if cut.axes(out) else 0
    new = [d if d is None or d in stay else cut.size(out, axis + lead, d) for axis, d in enumerate(named)]
    if None not in new:
        return cut.set_ints(node, 1, [d for d in new if d is not None])
    join = node.inputs[1].producer() if node.inputs[1] is not None else None
    assert join is not None
    for index, dim in enumerate(new):
        if dim is not None:
            cut.set_ints(join, index, [dim])


@rule("Expand")
def expand(flow: Flow, node: ir.Node) -> None:
    """`x, shape -> y`: axes of size one are repeated, to positions of their own; the others keep their labels."""
    x, before, after = flow.of(node.inputs[0]), flow.shape(node.inputs[0]), flow.shape(node.outputs[0])
    named = target(node)
    if before is None or after is None:
        return flow.lock_all(x, "the target of this Expand can't be followed")
    lead = len(after) - len(before)
    if named is not None:
        named = [*[1] * (len(after) - len(named)), *named]
    result: list[Vector] = [*([None] * lead), *x]
    for axis, size in enumerate(after):
        vector = result[axis]
        if vector is None and (axis < lead or before[axis - lead] == 1):
            known = named is not None and named[axis] is not None
            result[axis] = flow.fresh(size) if known else None
        elif vector is not None and (named is None or named[axis] is None):
            flow.lock(vector, "the target of this Expand names its size and is computed")
            result[axis] = None
    flow.give(node.outputs[0], result)


@resize("Expand")
def resize_expand(cut: Cut, node: ir.Node) -> None:
    """The target names sizes; 1 stays."""
    resize_named(cut, node, (1,))


@rule("Tile")
def tile(flow: Flow, node: ir.Node) -> None:
    """`x, repeats -> y`: each axis is repeated as a whole."""
    x, repeats = flow.of(node.inputs[0]), flow.ints(node, 1)
    if repeats is None:
        return flow.lock_all(x, "it is repeated a computed number of times")
    flow.give(node.outputs[0], [v if v is None else np.tile(v, n) for v, n in zip(x, repeats, strict=True)])


@rule("DepthToSpace")
def depth_to_space(flow: Flow, node: ir.Node) -> None:
    """`x[b,(r s c),h,w] -> y[b,c,(h r),(w s)]` (DCR), or `(c r s)` (CRD): only c can be cut."""
    x, shape, block = flow.of(node.inputs[0]), flow.shape(node.inputs[0]), integer(node, "blocksize", 1)
    if len(x) != 4 or x[1] is None or shape is None:
        return flow.lock_all(x, "the shape of this DepthToSpace is unknown")
    flow.lock_all(x[2:], "a spatial axis")
    crd = "mode" in node.attributes and node.attributes["mode"].as_string() == "CRD"
    channels = flow.fresh(len(x[1]) // block**2)
    if channels is None:
        return flow.lock(x[1], "it becomes one channel")
    flow.tie(x[1], np.repeat(channels, block**2) if crd else np.tile(channels, block**2))
    flow.give(node.outputs[0], (None, channels, None, None))


@rule("SpaceToDepth")
def space_to_depth(flow: Flow, node: ir.Node) -> None:
    """`x[b,c,(h r),(w s)] -> y[b,(r s c),h,w]`."""
    x, block = flow.of(node.inputs[0]), integer(node, "blocksize", 1)
    flow.lock_all(x[2:], "a spatial axis")
    flow.give(node.outputs[0], (None, None if x[1] is None else np.tile(x[1], block**2), None, None))
