"""Packed projections taken apart: queries, keys and values that one product makes become tensors of their own.

`x[..., (p h d)] -> Reshape -> [..., p, h, d] -> Transpose -> Gather 0, 1, 2` holds p things in one tensor, so that a
position that goes from one of them would go from all. Splitting x first, `x[..., (h d)]` for each, computes the same,
and lets each be cut by itself. The product stays one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxprune.graph.model import constant
from onnxprune.graph.shapes import Shapes, add_initializer, infer_shapes
from onnxprune.labels.flow import integer, integers

Order = tuple[int | None, ...]  # which axis of the reshaped tensor each axis is; None for one of size one


@dataclass(frozen=True)
class Taker:
    """A value that holds one of the parts: its number, the axis that numbers them, and the order of the other axes."""

    value: ir.Value
    part: int
    axis: int
    order: Order


def take_apart(model: ir.Model) -> None:
    """Splits what is reshaped into parts, all of which are picked one by one, before it is reshaped."""
    candidates = []
    for node in model.graph:
        if node.op_type == "Reshape" and not node.domain and not integer(node, "allowzero", 0):
            rank = _rank_of_target(node)
            takers = _takers(node.outputs[0], tuple(range(rank))) if rank else None
            if takers and len({taker.axis for taker in takers}) == 1:
                candidates.append((node, takers))
    shapes = infer_shapes(model) if candidates else None
    for node, takers in candidates:
        assert shapes is not None
        _split_before(model, node, takers, shapes)


def _rank_of_target(node: ir.Node) -> int:
    """The number of axes that a Reshape makes; 0 when its target isn't understood."""
    target = node.inputs[1]
    if (known := constant(target)) is not None:
        return int(known.size)
    join = target.producer() if target is not None else None
    return len(join.inputs) if join is not None and join.op_type == "Concat" else 0


def _takers(value: ir.Value, order: Order) -> list[Taker] | None:
    """All that is made of a value by moving its axes and picking a part; None when something else is done with it."""
    found: list[Taker] = []
    if value.is_graph_output():
        return None
    for node in value.consumers():
        taken = _taken(node, order)
        if taken is None:
            return None
        found += taken
    return found


def _taken(node: ir.Node, order: Order) -> list[Taker] | None:
    """What one node does with a value whose axes are in this order; None when that isn't understood."""
    axes = [int(axis) for axis in np.ravel(constant(node.inputs[1]))] if _constant_second(node) else []
    where = integer(node, "axis", 0) % len(order)
    if node.op_type == "Transpose":
        return _takers(node.outputs[0], tuple(order[i] for i in integers(node, "perm") or range(len(order))[::-1]))
    if node.op_type == "Unsqueeze" and axes:
        return _takers(node.outputs[0], _with_units(order, axes))
    if node.op_type == "Squeeze" and axes:
        gone = {index % len(order) for index in axes}
        left = tuple(each for index, each in enumerate(order) if index not in gone)
        return _takers(node.outputs[0], left) if all(order[index] is None for index in gone) else None
    axis, rest = order[where], order[:where] + order[where + 1 :]
    if axis is None:
        return None
    if node.op_type == "Gather" and len(axes) == 1 and _is_number(node.inputs[1]):
        return [Taker(node.outputs[0], axes[0], axis, rest)]
    if node.op_type == "Split":
        users = [(part, user) for part, output in enumerate(node.outputs) for user in output.consumers()]
        single = all(_squeezes(user) == [where] or _squeezes(user) == [where - len(order)] for _, user in users)
        return [Taker(user.outputs[0], part, axis, rest) for part, user in users] if single else None
    return None


def _squeezes(node: ir.Node) -> list[int]:
    known = constant(node.inputs[1]) if node.op_type == "Squeeze" and len(node.inputs) > 1 else None
    return [] if known is None else [int(axis) for axis in known]


def _is_number(value: ir.Value | None) -> bool:
    array = constant(value)
    return array is not None and array.ndim == 0


def _constant_second(node: ir.Node) -> bool:
    return len(node.inputs) > 1 and constant(node.inputs[1]) is not None


def _with_units(order: Order, axes: list[int]) -> Order:
    rank, left = len(order) + len(axes), list(order)
    units = {axis % rank for axis in axes}
    return tuple(None if axis in units else left.pop(0) for axis in range(rank))


def _split_before(model: ir.Model, node: ir.Node, takers: list[Taker], shapes: Shapes) -> None:
    source, axis = node.inputs[0], takers[0].axis
    before, after = shapes(source) if source is not None else None, shapes(node.outputs[0])
    if source is None or not before or after is None or before[-1] is None or None in after[axis:]:
        return
    count, inner = after[axis] or 0, [size or 0 for size in after[axis + 1 :]]
    if count < 2 or not inner or count * math.prod(inner) != before[-1]:
        return
    target = _shorter_target(model, node, axis)
    if target is None:
        return
    sizes = add_initializer(model, f"{node.name}.parts", np.full(count, math.prod(inner), np.int64))
    split = ir.node("Split", [source, sizes], {"axis": len(before) - 1}, num_outputs=count, name=f"{node.name}.split")
    steps = [split]

    def add(name: str, operator: str, inputs: list[ir.Value], **attributes: list[int]) -> ir.Value:
        step = ir.node(operator, inputs, attributes, name=name)
        step.outputs[0].name = name
        steps.append(step)
        return step.outputs[0]

    for part, value in enumerate(split.outputs):
        value.name = f"{node.name}.part{part}"
    for number, taker in enumerate(takers):
        name = f"{node.name}.taken{number}"
        value = add(f"{name}.reshape", "Reshape", [split.outputs[taker.part % count], target])
        kept = [each - (each > axis) for each in taker.order if each is not None]
        if kept != sorted(kept):
            value = add(f"{name}.transpose", "Transpose", [value], perm=kept)
        if units := [index for index, each in enumerate(taker.order) if each is None]:
            axes = add_initializer(model, f"{name}.axes", np.array(units, np.int64))
            value = add(f"{name}.unsqueeze", "Unsqueeze", [value, axes])
        taker.value.replace_all_uses_with(value)
    model.graph.insert_after(node, steps)


def _shorter_target(model: ir.Model, node: ir.Node, axis: int) -> ir.Value | None:
    """The target of a Reshape without the axis of the parts; None where a size behind it is copied from the input."""
    known = constant(node.inputs[1])
    if known is not None:
        if known[axis] < 1 or (known[axis + 1 :] < 1).any():
            return None
        return add_initializer(model, f"{node.name}.target", np.delete(known, axis))
    join = node.inputs[1].producer() if node.inputs[1] is not None else None
    sizes = [constant(value) for value in join.inputs] if join is not None else []
    if join is None or any(size is None or size.size != 1 or size.item() < 1 for size in sizes[axis:]):
        return None
    left = [value for index, value in enumerate(join.inputs) if index != axis]
    shorter = ir.node("Concat", left, {"axis": 0}, name=f"{node.name}.join")
    shorter.outputs[0].name = shorter.name
    model.graph.insert_before(node, shorter)
    return shorter.outputs[0]
