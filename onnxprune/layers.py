"""Whole layers: residual branches that can be dropped, with the skip connection left in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from onnxprune.data import Dataset, batches
from onnxprune.errors import UsageError
from onnxprune.evaluate import all_shapes, run_session, session_options
from onnxprune.model import open_session
from onnxprune.plan import Plan
from onnxprune.score import weight_values
from onnxprune.units import is_parameter, weight_matrix

CALIBRATION = 64  # samples on which the influence of layers is measured
UNIMPORTANT = 0.05  # influence below which `auto` drops a layer


@dataclass(frozen=True)
class Layer:
    """A residual branch: `add` joins it to the `skip`; `nodes` are those that nothing else needs, `add` among them."""

    add: ir.Node
    skip: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def name(self) -> str:
        """The name of the layer: that of the node that joins it."""
        return self.add.name or ""

    @property
    def weights(self) -> list[ir.Value]:
        """The parameters of the branch."""
        found = {value: None for node in self.nodes for value in node.inputs if value is not None}
        return [value for value in found if value.is_initializer() and is_parameter(value)]

    @property
    def params(self) -> int:
        """How many numbers the parameters of the branch hold."""
        return sum(value.const_value.size for value in self.weights if value.const_value is not None)


def find_layers(model: ir.Model) -> list[Layer]:
    """The residual branches of a normalised model, in order: `x + f(x)` of equal shapes, where f has weights."""
    shapes, order = all_shapes(model), {node: index for index, node in enumerate(model.graph)}
    weights = set(weight_values(model))
    found = []
    for node in model.graph:
        if node.op_type != "Add" or len(node.inputs) != 2 or node.domain or node.outputs[0].is_graph_output():
            continue
        for skip, branch in (node.inputs, node.inputs[::-1]):
            if skip is None or branch is None or skip.is_initializer() or branch.is_initializer() or skip is branch:
                continue
            if shapes.concrete(skip) != shapes.concrete(node.outputs[0]) or not _comes_from(branch, skip, order):
                continue
            layer = Layer(node, skip, _only_for(branch, node, skip))
            if weights.intersection(layer.weights):
                found.append(layer)
    return found


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


def _only_for(branch: ir.Value, add: ir.Node, skip: ir.Value) -> tuple[ir.Node, ...]:
    """The nodes that nothing but the branch needs, and the node that joins it to the skip."""
    inside = {add: None}
    pending = [branch.producer()]
    while pending:
        node = pending.pop()
        if node is None or node in inside or any(value.is_graph_output() for value in node.outputs):
            continue
        if all(user in inside for value in node.outputs for user in value.consumers()):
            inside[node] = None
            pending += [value.producer() for value in node.inputs if value is not None and value is not skip]
    return tuple(inside)


def weight_scores(layers: Sequence[Layer]) -> list[float]:
    """The root mean square of each branch's weights, relative to the mean over all branches: without data."""
    norms = []
    for layer in layers:
        arrays = [weight_matrix(value) for value in layer.weights]
        norms.append(np.sqrt(sum(float(np.square(a).sum()) for a in arrays) / max(1, sum(a.size for a in arrays))))
    return [float(norm / max(np.mean(norms), 1e-30)) for norm in norms]


def influence_scores(
    model: ir.Model, layers: Sequence[Layer], data: Dataset, threads: int | None = None
) -> list[float]:
    """How much each branch turns what it is added to: `1 - E[cos(x, x + f(x))]` on the first of the data.

    Men et al. 2024, ShortGPT, equation 1 (block influence).
    """
    outputs = list(model.graph.outputs)
    wanted = list(dict.fromkeys(value for layer in layers for value in (layer.skip, layer.add.outputs[0])))
    extra = [value for value in wanted if value not in outputs and not value.is_graph_input()]
    try:
        model.graph.outputs.extend(extra)
        session = open_session(model, session_options(threads))
    finally:
        model.graph.outputs.clear()
        model.graph.outputs.extend(outputs)
    part = data.take(slice(0, CALIBRATION))
    totals, count = np.zeros(len(layers)), 0
    names = [value.name for value in (*outputs, *extra)]
    size = next(iter(part.inputs.values())).shape[0] if len(part) < 16 else 16
    for batch in batches(part, size):
        values = dict(batch)
        values.update({name or "": array for name, array in zip(names, run_session(session, batch), strict=True)})
        for index, layer in enumerate(layers):
            x, y = (np.asarray(values[v.name or ""], np.float64) for v in (layer.skip, layer.add.outputs[0]))
            x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
            norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
            totals[index] += float(((x * y).sum(1) / np.maximum(norms, 1e-30)).mean())
        count += 1
    return [float(1 - total / count) for total in totals]


def choose_layers(layers: Sequence[Layer], scores: Sequence[float], wanted: int | None) -> list[Layer]:
    """The `wanted` layers of lowest score; without a number those that hardly matter. `UsageError` for too many."""
    if wanted is not None and wanted > len(layers):
        raise UsageError(f"--layers {wanted}: the model has {len(layers)} residual layers that can be dropped")
    order = sorted(range(len(layers)), key=lambda index: scores[index])
    if wanted is None:
        wanted = sum(score < UNIMPORTANT for score in scores)
    return [layers[index] for index in sorted(order[:wanted])]


def drop_layers(model: ir.Model, names: Sequence[str]) -> tuple[ir.Model, Plan]:
    """A copy of a model without the named layers, and the plan of that. Raises `UsageError` for any other name."""
    model = model.clone()
    found = {layer.name: layer for layer in find_layers(model)}
    unknown = [name for name in names if name not in found]
    if unknown:
        raise UsageError(f"{unknown[0]!r} is no residual layer of the model that can be dropped")
    chosen = [found[name] for name in names]
    gone = dict.fromkeys(node.name or "" for layer in chosen for node in layer.nodes)
    kept = tuple((layer.name, layer.skip.name or "") for layer in chosen)
    sides = [layer.add.inputs.index(layer.skip) for layer in chosen]
    for layer, side in zip(chosen, sides, strict=True):
        skip = layer.add.inputs[side]  # the skip of a layer may be the sum of another one that is gone
        assert skip is not None
        layer.add.outputs[0].replace_all_uses_with(skip)
    common.RemoveUnusedNodesPass()(model)
    return model, Plan({}, tuple(gone), (), kept)
