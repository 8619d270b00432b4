"""Which layers of a model can be fitted, where they are compared with the uncut ones, and why the others can't."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxprune.cutting.plan import Plan
from onnxprune.graph.floats import in_floats
from onnxprune.graph.model import constant
from onnxprune.labels.flow import operator_name
from onnxprune.labels.recurrent import GATES
from onnxprune.labels.units import weight_matrix
from onnxprune.repairing.linear import Linear, Use
from onnxprune.repairing.moments import SILENT, Array
from onnxprune.repairing.products import Product, Unfit, bias_of, product_of
from onnxprune.repairing.recurrent import STATES, Recurrent
from onnxprune.repairing.scales import scaling_of

Layer = Linear | Recurrent


@dataclass(frozen=True)
class Repaired:
    """What became of one layer: `gained` is the share of what it lacked, on held-out samples, that it won back."""

    layer: str
    kind: str
    gained: float | None = None
    why_not: str = ""

    def to_json(self) -> dict[str, Any]:
        """The row as JSON."""
        return {"layer": self.layer, "kind": self.kind, "gained": self.gained, "why_not": self.why_not}


@dataclass
class Found:
    """The layers of a model that can be fitted, in order, and those that can't, with the reason."""

    layers: list[Layer] = field(default_factory=list)
    refused: list[Repaired] = field(default_factory=list)


def name_of(node: ir.Node) -> str:
    """The name of a node in the model itself: in floats, fused ones are in parts."""
    name = node.name or node.outputs[0].name or ""
    for part in (".floats", ".product", ".normalised"):
        name = name.removesuffix(part)
    return name


TABLES = {"Gather", "Add", "Sub", "Mul", "Div", "Where", "Expand", "Concat", "Slice"}  # no products
PASSING = {"DequantizeLinear", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze"}  # a weight on its way to one


def unrepairable(model: ir.Model) -> dict[str, str]:
    """The nodes of a normalised model, by name, whose weights no repair would fit, with the reason for each."""
    twin = in_floats(model)
    found = find_layers(twin.model, twin.model, Plan({}))
    fitted = {node.name for layer in found.layers for node in layer.nodes}
    reasons = {each.layer: each.why_not for each in found.refused}
    for layer in found.layers:
        if isinstance(layer, Recurrent):
            try:
                layer.check(twin)
            except Unfit as error:
                reasons[name_of(layer.node)] = str(error)
                fitted.discard(layer.node.name)
    left = dict[str, str]()
    for node in twin.model.graph:
        held = any(value is not None and _is_matrix(_stored(value)) for value in node.inputs)
        if held and node.name not in fitted and operator_name(node) not in TABLES | PASSING:
            left[name_of(node)] = reasons.get(name_of(node), f"{operator_name(node)} isn't fitted")
    return left


def _stored(value: ir.Value) -> ir.Value:
    """The initializer behind an operand that is dequantised, cast or moved; else the operand."""
    node = value.producer()
    while node is not None and operator_name(node) in PASSING and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value if value.is_initializer() else None
    return tensor is not None and sum(int(dim) > 1 for dim in tensor.shape.numpy()) > 1


def find_layers(model: ir.Model, baseline: ir.Model, plan: Plan) -> Found:
    """What can be fitted in a cut model in floats, and what can't."""
    known = {value.name: node for node in baseline.graph for value in node.outputs}
    found, seen = Found(), set[ir.Value]()
    for node in model.graph:
        name = node.outputs[0].name or ""
        if operator_name(node) in GATES:
            _find_recurrent(node, baseline, plan, found)
            continue
        product = product_of(node) or scaling_of(node)
        if product is None:
            continue
        if product.weight in seen or name not in known:
            continue
        seen.add(product.weight)
        try:
            found.layers.append(_linear(product, known, plan))
        except Unfit as error:
            found.refused.append(Repaired(name_of(node), node.op_type, None, str(error)))
    return found


def first_readers(model: ir.Model, layers: list[Layer], names: Collection[str]) -> list[Layer]:
    """The layers that read values of these names, through other operators but through no other layer."""
    fitted = {node for layer in layers for node in layer.nodes}
    given = {*model.graph.inputs, *(value for node in model.graph for value in node.outputs)}
    pending, seen, found = [value for value in given if value.name in names], set[ir.Value](), set[ir.Node]()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        for node in value.consumers():
            if node in fitted:
                found.add(node)
            else:
                pending += node.outputs
    return [
        layer
        for layer in layers
        if found.intersection(layer.nodes)
        or (isinstance(layer, Recurrent) and any(value.name in names for value in layer.node.outputs))
    ]


def _find_recurrent(node: ir.Node, baseline: ir.Model, plan: Plan, found: Found) -> None:
    uncut = next((each for each in baseline.graph if each.name == node.name), None)
    if uncut is None:
        return
    for each in (node, uncut):
        if not each.outputs[0].name:
            each.outputs[0].name = f"{node.name}.{STATES}"
    removals = {removal.axis: removal for removal in plan.tensors.get(_cut_output(uncut, plan), ())}
    kept = next((removal.kept() for removal in removals.values()), None)
    found.layers.append(Recurrent(node, uncut, kept))


def _cut_output(node: ir.Node, plan: Plan) -> str:
    """An output of a recurrent layer that the plan speaks of; all end in the same units."""
    return next((value.name for value in node.outputs if value.name and value.name in plan.tensors), "")


def _linear(product: Product, known: dict[str | None, ir.Node], plan: Plan) -> Linear:
    """The layer of all nodes that use the same weights. Raises `Unfit` where one of them does something else."""
    weight, uses = product.weight, list[Use]()
    array = np.asarray(constant(weight))
    numbered = np.arange(array.size, dtype=np.float64).reshape(array.shape)
    laid = product.matrix(numbered)
    for user, _ in weight.uses():
        own = product if user is product.node else product_of(user) or scaling_of(user)
        if (
            own is None
            or type(own) is not type(product)
            or own.weight is not weight
            or own.factor(0) != product.factor(0)
            or not np.array_equal(laid, own.matrix(numbered))
        ):
            raise Unfit(f"its weights are used by {user.op_type} {user.name} in another way")
        end, scale = _end(user)
        if end.name not in known:
            end, scale = user.outputs[0], np.ones(1)
        if end.name not in known:
            raise Unfit("its output isn't one of the uncut model")
        groups, _, outputs = laid.shape
        wide = scale if scale.size == 1 else scale.reshape(groups, outputs)
        uses.append(Use(own, bias_of(own, groups * outputs), end, wide))
    removals = {
        use.end.name or "": [(removal.axis, removal.kept()) for removal in plan.tensors.get(use.end.name or "", ())]
        for use in uses
    }
    return Linear(weight, uses, removals)


def _end(node: ir.Node) -> tuple[ir.Value, Array]:
    """The sum that a layer's output is added to, through biases and batch normalisation, and what it is scaled by."""
    value = own = node.outputs[0]
    scale = np.ones(1)
    while len(value.uses()) == 1 and not value.is_graph_output():
        user = value.consumers()[0]
        fixed = [each for each in user.inputs if each is not None and each.is_initializer()]
        if user.op_type == "BatchNormalization" and len(fixed) == 4:
            gamma, _, _, variance = (weight_matrix(each) for each in fixed)
            epsilon = user.attributes["epsilon"].as_float() if "epsilon" in user.attributes else 1e-5
            scale = scale * gamma / np.sqrt(variance + epsilon)
        elif user.op_type == "Add" and not fixed:
            silent = np.abs(scale) < SILENT * np.abs(scale).max()  # a channel that hardly arrives can't mend anything
            return user.outputs[0], np.where(silent, np.inf, scale)
        elif user.op_type == "Add" and own is value:
            own = user.outputs[0]  # with its bias
        elif user.op_type != "Add":
            break
        value = user.outputs[0]
    return own, np.ones(1)
