"""Control flow that is decided before a model runs: loops with a constant count, constant conditions, known sequences.

Exporters write some plain code that way (tensor_split, recurrent layers of TensorFlow). Unrolled, it is ordinary nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxprune.graph.model import constant
from onnxprune.graph.shapes import add_initializer, replace_node
from onnxprune.labels.flow import integer

MOST_NODES = 2000  # that a loop may become

Parts = list[ir.Value]


def unroll(model: ir.Model, fold: Callable[[ir.Model], None]) -> ir.Model:
    """The same model with decided control flow unrolled; `fold` computes what is constant in between."""
    if not any(_body(node) is not None or node.op_type.startswith("Sequence") for node in model.graph):
        return model
    changed = model.clone()
    conditions: Parts = []
    while sum(_unroll_node(changed, node, conditions) for node in list(changed.graph)):
        fold(changed)
    _resolve_sequences(changed)
    fold(changed)
    said = [constant(node.inputs[0]) for value in conditions if (node := value.producer()) is not None]
    for value in conditions:
        changed.graph.outputs.remove(value)
    return changed if all(array is not None and bool(array) for array in said) else model


def _body(node: ir.Node) -> ir.Graph | None:
    for name in ("body", "then_branch"):
        if name in node.attributes:
            return node.attributes[name].as_graph()
    return None


def _unroll_node(model: ir.Model, node: ir.Node, conditions: Parts) -> bool:
    if node.domain == "" and node.op_type == "If":
        return _take_branch(model, node)
    if node.domain == "" and node.op_type == "Loop":
        return _unroll_loop(model, node, conditions)
    return False


def _take_branch(model: ir.Model, node: ir.Node) -> bool:
    condition = constant(node.inputs[0])
    if condition is None:
        return False
    branch = node.attributes["then_branch" if bool(condition) else "else_branch"].as_graph()
    _replace(model, node, _inline(model, branch, [], node))
    return True


def _unroll_loop(model: ir.Model, node: ir.Node, conditions: Parts) -> bool:
    """Unrolls a loop whose count is constant and whose condition depends on constants alone."""
    body, count, go = node.attributes["body"].as_graph(), _number(node.inputs[0]), node.inputs[1]
    first = True if go is None else constant(go)
    if count is None or first is None or not bool(first) or count * len(body) > MOST_NODES:
        return False
    if not _condition_is_constant(node, body):
        return False
    carried = [value for value in node.inputs[2:] if value is not None]
    scans: list[Parts] = [[] for _ in body.outputs[1 + len(carried) :]]
    for index in range(count):
        step = add_initializer(model, f"{node.name}.step", np.full(np.shape(constant(node.inputs[0])), index, np.int64))
        true = add_initializer(model, f"{node.name}.true", np.full(np.shape(first), True))
        condition, *results = _inline(model, body, [step, true, *carried], node)
        carried = results[: len(carried)]
        for scan, value in zip(scans, results[len(carried) :], strict=True):
            scan.append(value)
        if index + 1 < count:
            conditions.append(_add(model, node, "Identity", [condition]))
            model.graph.outputs.append(conditions[-1])  # until it is known what it says
    _replace(model, node, [*carried, *(_stacked(model, node, scan) for scan in scans)])
    return True


def _condition_is_constant(node: ir.Node, body: ir.Graph) -> bool:
    """Whether the condition is computed from constants, the step, and what is carried and computed so itself."""
    carried = list(zip(body.inputs[2:], node.inputs[2:], body.outputs[1:], strict=False))
    fixed = {formal for formal, actual, _ in carried if constant(actual) is not None}
    while True:
        known = {*body.inputs[:2], *fixed}
        for inner in body:
            if all(value is None or value in known or constant(value) is not None for value in inner.inputs):
                known.update(inner.outputs)
        still = {formal for formal, _, result in carried if formal in fixed and _settled(result, known)}
        if still == fixed:
            return _settled(body.outputs[0], known)
        fixed = still


def _settled(value: ir.Value, known: set[ir.Value]) -> bool:
    return value in known or constant(value) is not None


def _inline(model: ir.Model, body: ir.Graph, inputs: Sequence[ir.Value], before: ir.Node) -> Parts:
    """Puts a copy of a subgraph in front of a node; the values of its outputs."""
    copy = body.clone(allow_outer_scope_values=True)
    actual = dict(zip(copy.inputs, inputs, strict=False))
    for name, value in list(copy.initializers.items()):
        assert value.const_value is not None
        actual[value] = add_initializer(model, name, value.const_value.numpy())
    outputs = [actual.get(value, value) for value in copy.outputs]
    copy.outputs.clear()
    for formal, value in actual.items():
        formal.replace_all_uses_with(value)
    nodes = list(copy)
    copy.remove(nodes)
    for node in nodes:
        node.name = f"{node.name}.{len(model.graph)}"  # the graph grows: no copy gets the names of another
        for value in node.outputs:
            value.name = f"{value.name}.{len(model.graph)}" if value.name else value.name
    model.graph.insert_before(before, nodes)
    return outputs


def _replace(model: ir.Model, node: ir.Node, values: Parts) -> None:
    for old, new in zip(node.outputs, values, strict=False):
        if old.is_graph_output():
            same = ir.node("Identity", [new], name=f"{node.name}.out")
            model.graph.insert_before(node, same)
            old.replace_all_uses_with(same.outputs[0], replace_graph_outputs=True)
            same.outputs[0].name, same.outputs[0].type, same.outputs[0].shape = old.name, old.type, old.shape
            old.name = f"{old.name}.gone"
        else:
            old.replace_all_uses_with(new)
    model.graph.remove(node, safe=True)


def _stacked(model: ir.Model, node: ir.Node, parts: Parts) -> ir.Value:
    """The values along a new first axis."""
    axes = add_initializer(model, f"{node.name}.axes", np.array([0], np.int64))
    rows = [_add(model, node, "Unsqueeze", [part, axes]) for part in parts]
    return _add(model, node, "Concat", rows, axis=0)


def _add(model: ir.Model, before: ir.Node, op: str, inputs: Parts, **attributes: int) -> ir.Value:
    new = ir.node(op, inputs, attributes)
    new.name = f"{before.name}.{op}.{len(model.graph)}"
    new.outputs[0].name = new.name
    model.graph.insert_before(before, new)
    return new.outputs[0]


def _resolve_sequences(model: ir.Model) -> None:
    """Replaces what is taken out of a sequence whose elements are known by the element itself."""
    held: dict[ir.Value, Parts] = {}
    for node in list(model.graph):
        if node.domain != "":
            continue
        inputs = [value for value in node.inputs if value is not None]
        known = held.get(inputs[0]) if inputs else None
        place = _number(inputs[-1]) if len(inputs) > 1 else None
        if node.op_type == "SequenceEmpty":
            held[node.outputs[0]] = []
        elif node.op_type == "SequenceConstruct":
            held[node.outputs[0]] = inputs
        elif known is None:
            continue
        elif node.op_type == "SequenceInsert" and (len(inputs) == 2 or place is not None):
            parts = list(known)
            parts.insert(len(parts) if len(inputs) == 2 or place is None else place, inputs[1])
            held[node.outputs[0]] = parts
        elif node.op_type == "SequenceAt" and place is not None:
            _replace(model, node, [known[place]])
        elif node.op_type == "SequenceLength":
            _replace(model, node, [add_initializer(model, f"{node.name}.length", np.array(len(known), np.int64))])
        elif node.op_type == "ConcatFromSequence":
            _join(model, node, known)


def _number(value: ir.Value | None) -> int | None:
    array = constant(value)
    return int(array.reshape(-1)[0]) if array is not None and array.size == 1 and array.dtype.kind in "iu" else None


def _join(model: ir.Model, node: ir.Node, parts: Parts) -> None:
    axis = integer(node, "axis", 0)
    if integer(node, "new_axis", 0):
        axes = add_initializer(model, f"{node.name}.axes", np.array([axis], np.int64))
        parts = [_add(model, node, "Unsqueeze", [part, axes]) for part in parts]
    replace_node(model, node, ir.node("Concat", parts, {"axis": axis}, name=f"{node.name}.joined"))
