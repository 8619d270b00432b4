"""Shape arithmetic made readable: static sizes become constants, dynamic ones are read where they come from.

Exporters compute the targets of Reshape and Expand from shapes, in a dozen nodes each. Rewritten, a target is a
constant or a join of single numbers, so that a rule can tell which number belongs to which axis.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxprune.graph.model import constant
from onnxprune.graph.shapes import Shapes, add_initializer, infer_shapes, replace_node


def simplify_shape_arithmetic(model: ir.Model) -> None:
    """Replaces computed Reshape and Expand targets by constants where only one dimension is dynamic.

    What is constant in both walks becomes an initializer; Reshape targets hold -1 and 0 for dynamic dimensions;
    Expand targets hold 1 where the input already has the size, so that they hold no channel counts.
    """
    shapes = infer_shapes(model)
    rewrites: dict[str, Callable[[ir.Model, ir.Node, Shapes], None]] = {
        "Shape": _partial_shape,
        "Reshape": _constant_reshape,
        "Expand": _short_expand,
        "ConstantOfShape": _fill_by_expand,
        "GatherND": _plain_gather,
    }
    for node in list(model.graph):
        for value in node.outputs:
            held = shapes.contents(value)
            if held is not None and held[0].dtype.kind in "iub" and np.array_equal(*held):
                replacement = add_initializer(model, f"{value.name}.constant", held[0])
                for user, index in list(value.uses()):
                    user.replace_input_with(index, replacement)
    for node in list(model.graph):
        if node.domain == "" and node.op_type in rewrites:
            rewrites[node.op_type](model, node, shapes)


def _partial_shape(model: ir.Model, node: ir.Node, shapes: Shapes) -> None:
    """Reads no static size: as constants those don't lock the axes that they are read from."""
    source = node.inputs[0]
    sizes = shapes(source) if source is not None else None
    if sizes is None or source is None:
        return
    start, end, _ = slice(*(_bound(node, name) for name in ("start", "end"))).indices(len(sizes))
    parts: list[ir.Value] = []
    for axis in range(start, end):
        if (dim := sizes[axis]) is not None:
            parts.append(add_initializer(model, f"{node.name}.dim", np.array([dim], np.int64)))
            continue
        single = ir.node("Shape", [source], {"start": axis, "end": axis + 1}, name=f"{node.name}.axis{axis}")
        single.outputs[0].name = single.name
        model.graph.insert_before(node, single)
        parts.append(single.outputs[0])
    if len(parts) > 1:
        replace_node(model, node, ir.node("Concat", parts, {"axis": 0}, name=f"{node.name}.joined"))


def _bound(node: ir.Node, name: str) -> int | None:
    return int(node.attributes[name].as_int()) if name in node.attributes else None


def _constant_reshape(model: ir.Model, node: ir.Node, shapes: Shapes) -> None:
    source, out = node.inputs[0], node.outputs[0]
    before, after = shapes(source) if source else None, shapes(out)
    if constant(node.inputs[1]) is not None or before is None or after is None or source is None or 0 in after:
        return
    a, c = shapes.pairs(source), shapes.pairs(out)
    unknown = [axis for axis, dim in enumerate(after) if dim is None]
    copied = [axis for axis in unknown if axis < len(a) and a[axis] == c[axis]]
    free = [axis for axis in unknown if axis not in copied]
    if len(unknown) == 1:  # -1 says the same as 0, and survives a change of the input's rank
        copied, free = [], unknown
    nameless = [axis for axis in free if _dimension_with(model, source, c[axis], shapes) is None]
    if len(nameless) > 1:
        return
    inferred = nameless[0] if nameless else free[-1] if free else None
    target = [0 if axis in copied else -1 if axis == inferred else dim for axis, dim in enumerate(after)]
    vector = _shape_vector(model, node, target, shapes)
    if vector is not None:
        node.replace_input_with(1, vector)
        node.attributes.pop("allowzero", None)


def _short_expand(model: ir.Model, node: ir.Node, shapes: Shapes) -> None:
    source, out = node.inputs[0], node.outputs[0]
    before, after = shapes(source) if source else None, shapes(out)
    if before is None or after is None:
        return
    padded = (1,) * (len(after) - len(before)) + before
    target = [1 if dim == have and dim is not None else dim for dim, have in zip(after, padded, strict=True)]
    vector = _shape_vector(model, node, target, shapes)
    if vector is not None:
        node.replace_input_with(1, vector)


def _fill_by_expand(model: ir.Model, node: ir.Node, shapes: Shapes) -> None:
    after = shapes(node.outputs[0])
    if after is None or 0 in after or all(dim is not None for dim in after):
        return
    vector = _shape_vector(model, node, [1 if dim is not None else None for dim in after], shapes)
    if vector is None:
        return
    fill = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
    full = add_initializer(
        model, f"{node.outputs[0].name}.fill", np.full([dim or 1 for dim in after], fill.reshape(-1)[0], fill.dtype)
    )
    replace_node(model, node, ir.node("Expand", [full, vector], name=f"{node.name}.expand"))


def _plain_gather(model: ir.Model, node: ir.Node, shapes: Shapes) -> None:
    """Constant positions along the first axis are what Gather picks."""
    picked, batch = constant(node.inputs[1]), node.attributes.get("batch_dims")
    if picked is not None and picked.ndim > 1 and picked.shape[-1] == 1 and (batch is None or batch.as_int() == 0):
        indices = add_initializer(model, f"{node.name}.indices", picked[..., 0])
        replace_node(model, node, ir.node("Gather", [node.inputs[0], indices], {"axis": 0}, name=node.name))


def _shape_vector(model: ir.Model, node: ir.Node, dims: list[int | None], shapes: Shapes) -> ir.Value | None:
    """A value holding `dims`, with each None read off the dimension, of the operand or an input, that it follows."""
    name, pairs = node.outputs[0].name or "", shapes.pairs(node.outputs[0])
    if None not in dims:
        return add_initializer(model, f"{name}.target", np.array(dims, np.int64))
    parts: list[ir.Value] = []
    for axis, dim in enumerate(dims):
        if dim is not None:
            parts.append(add_initializer(model, f"{name}.dim", np.array([dim], np.int64)))
            continue
        found = _dimension_with(model, node.inputs[0] if node.op_type == "Reshape" else None, pairs[axis], shapes)
        if found is None:
            return None
        value, at = found
        sized = ir.node("Shape", [value], {"start": at, "end": at + 1}, name=f"{node.name}.shape{axis}")
        model.graph.insert_before(node, sized)
        sized.outputs[0].name = f"{name}.shape{axis}"
        parts.append(sized.outputs[0])
    joined = ir.node("Concat", parts, {"axis": 0}, name=f"{node.name}.target")
    model.graph.insert_before(node, joined)
    joined.outputs[0].name = f"{name}.target"
    return joined.outputs[0]


def _dimension_with(
    model: ir.Model, operand: ir.Value | None, sizes: tuple[int, int], shapes: Shapes
) -> tuple[ir.Value, int] | None:
    """A dynamic dimension, (value, axis), that has these sizes in the two walks: of a graph input, or of an operand."""
    for value in (*model.graph.inputs, *([operand] if operand is not None else [])):
        if value.is_initializer() or shapes(value) is None:
            continue
        for axis, (dim, pair) in enumerate(zip(shapes(value) or (), shapes.pairs(value), strict=True)):
            if dim is None and pair == sizes:
                return value, axis
    return None
