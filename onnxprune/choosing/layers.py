"""Whole layers that can be dropped: residual branches, and whatever else gives its output the shape of its input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from onnxprune.cutting.plan import Plan
from onnxprune.errors import UsageError
from onnxprune.evaluating.evaluate import all_shapes
from onnxprune.graph.shapes import Shapes
from onnxprune.labels.pointwise import BROADCAST, SUMS, UNARY
from onnxprune.labels.units import is_parameter, protected, weight_matrix
from onnxprune.scoring.score import stored, weight_values

FOLLOWING = {*UNARY.split(), *BROADCAST.split(), "BatchNormalization"}  # what may belong to the layer before it


@dataclass(frozen=True)
class Layer:
    """What can be dropped: its `output` becomes its input, the value that is `kept`, of the same shape.

    `nodes` are those that nothing else needs, the last first; `entry` is where the kept value enters: a node and the
    number of its input. In a residual branch, whose last node is a sum, that is the sum itself.
    """

    nodes: tuple[ir.Node, ...]
    entry: tuple[ir.Node, int]

    @property
    def kept(self) -> ir.Value:
        """What stays in place of the layer."""
        value = self.entry[0].inputs[self.entry[1]]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        """What the layer makes."""
        return self.nodes[0].outputs[0]

    @property
    def name(self) -> str:
        """The name of the layer: that of its last node."""
        return self.nodes[0].name or ""

    @property
    def residual(self) -> bool:
        """Whether it is a branch that is added to what is kept."""
        return self.entry[0] is self.nodes[0] and self.nodes[0].op_type in SUMS

    @property
    def weights(self) -> list[ir.Value]:
        """The parameters of the layer."""
        found = {value: None for node in self.nodes for value in node.inputs if value is not None}
        return [value for value in found if value.is_initializer() and is_parameter(value)]

    @property
    def params(self) -> int:
        """How many numbers the parameters of the layer hold."""
        return sum(value.const_value.size for value in self.weights if value.const_value is not None)


def find_layers(model: ir.Model) -> list[Layer]:
    """What can be dropped of a normalised model, in order.

    Residual branches, `x + f(x)` of equal shapes where f has weights; and outside of those, layers whose output has the
    shape of their input, each with the normalisation and activation behind it.
    """
    shapes, weights = all_shapes(model), set(weight_values(model))
    branches = _residual_branches(model, shapes, weights)
    inside = {node for layer in branches for node in layer.nodes}
    chain = [layer for node in model.graph if node not in inside and (layer := _from(node, shapes, weights))]
    order = {node: index for index, node in enumerate(model.graph)}
    return sorted([*branches, *chain], key=lambda layer: order[layer.nodes[0]])


def _residual_branches(model: ir.Model, shapes: Shapes, weights: set[ir.Value]) -> list[Layer]:
    order = {node: index for index, node in enumerate(model.graph)}
    found = []
    for node in model.graph:
        if node.op_type not in SUMS or len(node.inputs) != 2 or node.domain or node.outputs[0].is_graph_output():
            continue
        for side, (skip, branch) in enumerate((node.inputs, node.inputs[::-1])):
            if skip is None or branch is None or skip.is_initializer() or branch.is_initializer() or skip is branch:
                continue
            if shapes.concrete(skip) != shapes.concrete(node.outputs[0]) or not _comes_from(branch, skip, order):
                continue
            layer = Layer(_only_for(node, skip), (node, side))
            if weights.intersection(layer.weights):
                found.append(layer)
    return found


def _from(node: ir.Node, shapes: Shapes, weights: set[ir.Value]) -> Layer | None:
    """The layer that starts at a node with weights: up to the last operator that does nothing but act on its numbers.

    None when its output hasn't the shape and type of its input, or is needed elsewhere on the way.
    """
    data = [index for index, value in enumerate(node.inputs) if value is not None and stored(value) is None]
    if len(data) != 1 or not any(stored(value) in weights for value in node.inputs) or len(node.outputs) != 1:
        return None
    kept, output = node.inputs[data[0]], node.outputs[0]
    assert kept is not None
    while len(output.uses()) == 1 and not output.is_graph_output():
        user = output.consumers()[0]
        beside = [value for value in user.inputs if value is not None and value is not output]
        if user.op_type not in FOLLOWING or not all(value.is_initializer() for value in beside):
            break
        output = user.outputs[0]
    facts = [(shapes(value), shapes.concrete(value), shapes.element_type(value)) for value in (kept, output)]
    last = output.producer()
    if None in facts[0] or facts[0] != facts[1] or last is None or output.is_graph_output():
        return None
    return Layer(_only_for(last, kept), (node, data[0]))


def _comes_from(value: ir.Value, source: ir.Value, order: dict[ir.Node, int]) -> bool:
    """Whether a value is computed from another one's numbers, not only from its shape."""
    made = source.producer()
    first = order[made] if made is not None else -1
    pending, seen = [value], {value}
    while pending:
        node = pending.pop().producer()
        if node is None or node.op_type == "Shape" or order.get(node, -1) <= first:
            continue
        for each in node.inputs:
            if each is source:
                return True
            if each is not None and each not in seen:
                seen.add(each)
                pending.append(each)
    return False


def _only_for(last: ir.Node, kept: ir.Value) -> tuple[ir.Node, ...]:
    """The last node of a layer, and those before it that nothing else needs."""
    inside = {last: None}
    pending = [value.producer() for value in last.inputs if value is not None and value is not kept]
    while pending:
        node = pending.pop()
        if node is None or node in inside or any(value.is_graph_output() for value in node.outputs):
            continue
        if all(user in inside for value in node.outputs for user in value.consumers()):
            inside[node] = None
            pending += [value.producer() for value in node.inputs if value is not None and value is not kept]
    return tuple(inside)


def weight_scores(model: ir.Model, layers: Sequence[Layer]) -> list[float]:
    """How large the weights are that turn the input of each layer into its output: without data.

    The root mean square, relative to the mean over all layers, of a residual branch's weights. Other layers change
    nothing when they are the identity, so theirs is of what differs from it.
    """
    norms, weights = [], set(weight_values(model))
    for layer in layers:
        arrays = [weight_matrix(value) for value in layer.weights if value in weights]
        if not layer.residual:
            arrays = [array - _identity(array.shape) for array in arrays if array.ndim > 1]
        norms.append(np.sqrt(sum(float(np.square(a).sum()) for a in arrays) / max(1, sum(a.size for a in arrays))))
    return [float(norm / max(np.mean(norms), 1e-30)) for norm in norms]


def _identity(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """What a weight of this shape is in a layer that changes nothing: a matrix, or the middle taps of a convolution."""
    identity, rows = np.zeros(shape), np.arange(shape[0])
    identity[(rows, rows % shape[1], *(np.full_like(rows, size // 2) for size in shape[2:]))] = 1
    return identity


def check_norm(rule: str) -> tuple[float, float | None]:
    """A rule for layers by the norm of their weights: which norm, and the share of the largest it must have, if any.

    `2` is compared with tau by size, `2:0.01` with a hundredth of the largest layer's. Raises `UsageError` for others.
    """
    name, _, share = rule.partition(":")
    try:
        order, least = float(name), float(share) if share else None
    except ValueError:
        order, least = 0.0, None
    if order not in (1.0, 2.0, math.inf) or not (least is None or 0 < least < 1):
        raise UsageError(f"--layer-norm {rule}: give 1, 2 or inf, or one with a share of the largest: 2:0.01")
    return order, least


def layer_norms(model: ir.Model, layers: Sequence[Layer], order: float) -> dict[str, float]:
    """The p-norm of each layer's weights by size, `(sum abs(w)^p / n)^(1/p)`; for infinity the largest weight."""
    weights, found = set(weight_values(model)), dict[str, float]()
    for layer in layers:
        arrays = [weight_matrix(value).ravel() for value in layer.weights if value in weights]
        flat = np.abs(np.concatenate(arrays)) if arrays else np.zeros(1)
        found[layer.name] = float(flat.max() if math.isinf(order) else np.mean(flat**order) ** (1 / order))
    return found


def free_layers(model: ir.Model, protect: Sequence[str]) -> list[Layer]:
    """The layers that can be dropped and hold no protected parameter."""
    fixed = set(protected(model, protect))
    return [layer for layer in find_layers(model) if not fixed.intersection(layer.weights)]


def choose_layers(layers: Sequence[Layer], scores: Sequence[float], wanted: int) -> list[Layer]:
    """The `wanted` layers of lowest score. `UsageError` for too many."""
    if wanted > len(layers):
        raise UsageError(f"--layers {wanted}: the model has {len(layers)} layers that can be dropped")
    order = sorted(range(len(layers)), key=lambda index: scores[index])
    return [layers[index] for index in sorted(order[:wanted])]


def drop_layers(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, Plan]:
    """A copy of a model without the named layers, and the plan of that. Raises `UsageError` for any other name."""
    model = model.clone()
    found = {layer.name: layer for layer in find_layers(model)}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is no layer of the model that can be dropped")
    chosen = [found[name] for name in names]
    gone = dict.fromkeys(node.name or "" for layer in chosen for node in layer.nodes)
    kept = tuple((layer.name, layer.kept.name or "") for layer in chosen)
    for layer in chosen:  # what is kept may be the output of another one that is gone by now
        layer.output.replace_all_uses_with(layer.kept)
    common.RemoveUnusedNodesPass()(model)
    return model, Plan({}, tuple(gone), (), kept)
