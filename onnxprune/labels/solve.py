"""From ties to components: the units that can be removed, the locks, and which axis of each rectangle is cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxprune.checks import check_option
from onnxprune.evaluating.evaluate import all_shapes
from onnxprune.graph.shapes import Shapes
from onnxprune.labels.flow import RULES, Flow, Lock, Rectangle, Vector, operator_name
from onnxprune.labels.locked import LOCKED

Granularity = Literal["rows", "columns", "auto"]


@dataclass(frozen=True)
class Solution:
    """What the analysis found. Arrays are indexed by label (`component`, `atom`) or by component.

    An atom is what the rules' own ties hold together; the axis along which each rectangle is cut ties atoms to units.
    """

    flow: Flow
    component: NDArray[np.int64]
    atom: NDArray[np.int64]
    locked: NDArray[np.bool_]
    inexact_nodes: dict[int, set[str]]

    @property
    def shapes(self) -> Shapes:
        """The shapes of every value of the analysed model."""
        return self.flow.shapes

    def axes(self, value: ir.Value) -> tuple[Vector, ...]:
        """The components at every position of each axis of a value; None for an axis that can't be cut."""
        return tuple(v if v is None else self.component[v] for v in self.flow.axes.get(value, ()))

    def lock_reasons(self) -> dict[int, Lock]:
        """The first lock of every locked component."""
        reasons: dict[int, Lock] = {}
        for lock in self.flow.locks:
            for component in np.unique(self.component[lock.labels]):
                reasons.setdefault(int(component), lock)
        return reasons


def analyse(model: ir.Model, granularity: Granularity = "auto", shapes: Shapes | None = None) -> Solution:
    """Finds which positions of which tensors of a normalised model live and die together.

    `granularity` says along which axis tensors with two axes of channels are cut: "rows" (whole heads, whole groups),
    "columns" (the same entry of every head or group), or "auto": heads by rows, groups by columns. Raises `UsageError`
    for another.
    """
    check_option("granularity", granularity, Granularity)
    flow = Flow(model, shapes or all_shapes(model))
    for node in model.graph:
        flow.node = node
        _apply_rule(flow, node)
    flow.node = None
    for value in model.graph.outputs:
        for vector in flow.of(value):
            flow.lock(vector, "it is an output of the model", value)
    return _solve(flow, granularity)


def _apply_rule(flow: Flow, node: ir.Node) -> None:
    known = RULES.get(operator_name(node))
    seen = [value for value in (*node.inputs, *node.outputs) if value is not None and (value.name or value.producer())]
    if known is None:
        reason = LOCKED.get(operator_name(node), "no rule for this operator")
    elif _captured(node):
        reason = "a subgraph uses it"
    elif any(flow.shape(value) is None for value in seen if not _unused(value)):
        reason = "the shape of an operand is unknown"
    else:
        flow.asked.clear()
        marks = len(flow.ties), len(flow.locks), len(flow.rectangles)
        flow.ended.clear()
        known(flow, node)
        for unseen in {value for value in node.inputs if value is not None} - flow.asked:
            # a rule answers for the operands that it looks at; a target or a size must stay as it is
            flow.lock_all(flow.of(unseen), f"{operator_name(node)} reads it as it is")
        _lock_what_is_lost(flow, node, marks)
        return
    for value in (*node.inputs, *_captured(node)):
        if value is not None:
            for vector in flow.of(value):
                flow.lock(vector, f"{reason} ({operator_name(node)})", value)


def _lock_what_is_lost(flow: Flow, node: ir.Node, marks: tuple[int, int, int]) -> None:
    """Locks axes of operands that a rule neither passed on nor tied, locked or ended: it didn't think of them."""
    dealt = [vector for value in node.outputs for vector in flow.axes.get(value, ()) if vector is not None]
    dealt += [side for pair in flow.ties[marks[0] :] for side in pair]
    dealt += [lock.labels for lock in flow.locks[marks[1] :]]
    dealt += [v for each in flow.rectangles[marks[2] :] for v in (each.flat, *each.axes) if v is not None] + flow.ended
    known = {id(vector) for vector in dealt}
    for value in node.inputs:
        for vector in flow.axes.get(value, ()) if value is not None else ():
            if vector is None or id(vector) in known:
                continue
            if not dealt or not np.isin(vector, np.concatenate(dealt)).any():
                flow.lock(vector, f"{operator_name(node)} loses it", value)


def _unused(value: ir.Value) -> bool:
    return value.producer() is not None and not value.uses() and not value.is_graph_output()


def _captured(node: ir.Node) -> list[ir.Value]:
    """Values from outside that the subgraphs of a node (If, Loop, Scan) use."""
    found = []
    for attribute in node.attributes.values():
        graphs = (
            [attribute.as_graph()]
            if attribute.type == ir.AttributeType.GRAPH
            else list(attribute.as_graphs())
            if attribute.type == ir.AttributeType.GRAPHS
            else []
        )
        for graph in graphs:
            for inner in graph.all_nodes():
                found += [value for value in inner.inputs if value is not None]
            found += list(graph.outputs)
    return found


def _solve(flow: Flow, granularity: Granularity) -> Solution:
    pending = list(flow.rectangles)
    atom = component = _components(flow)
    while True:
        locked = _locked(flow, component)
        if not pending:
            break
        # Rectangles that share no component don't influence each other: settle one of every family at a time.
        settled: list[Rectangle] = []
        rest: list[Rectangle] = []
        touched = np.zeros(len(locked), bool)
        for rectangle in pending:
            members = np.unique(
                component[np.concatenate([rectangle.flat, *[a for a in rectangle.axes if a is not None]])]
            )
            (rest if touched[members].any() else settled).append(rectangle)
            touched[members] = True
        for rectangle in settled:
            _settle(flow, rectangle, component, locked, granularity)
        component, pending = _components(flow), rest
    inexact: dict[int, set[str]] = {}
    for labels, node in flow.inexact_labels:
        for item in np.unique(component[labels]):
            inexact.setdefault(int(item), set()).add(node)
    return Solution(flow, component, atom, locked, inexact)


def _components(flow: Flow) -> NDArray[np.int64]:
    if not flow.ties:
        return np.arange(flow.count, dtype=np.int64)
    a = np.concatenate([pair[0] for pair in flow.ties])
    b = np.concatenate([pair[1] for pair in flow.ties])
    graph = coo_array((np.ones(len(a), np.int8), (a, b)), shape=(flow.count, flow.count))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def _locked(flow: Flow, component: NDArray[np.int64]) -> NDArray[np.bool_]:
    locked = np.zeros(int(component.max(initial=-1)) + 1, bool)
    for lock in flow.locks:
        locked[component[lock.labels]] = True
    return locked


def _settle(
    flow: Flow, rectangle: Rectangle, component: NDArray[np.int64], locked: NDArray[np.bool_], granularity: Granularity
) -> None:
    """Chooses the axis along which a rectangle is cut, ties its slices, and locks its other axes."""
    grid = rectangle.flat.reshape(rectangle.sizes)
    axes = range(len(rectangle.sizes))
    free = {axis: _free_units(grid, rectangle.axes[axis], axis, component, locked) for axis in axes}
    candidates = [axis for axis in axes if free[axis]]
    chosen, heads = None, _heads(flow, component)
    if candidates:
        chosen = max(
            candidates,
            key=lambda axis: (
                free[axis] > 1,
                {"rows": -axis, "columns": axis, "auto": 0}[granularity],
                axis == rectangle.prefer,
                heads[component[rectangle.axes[axis]]].any(),
                free[axis],
            ),
        )
    for axis in axes:
        vector = rectangle.axes[axis]
        if axis == chosen and vector is not None:
            spread = np.broadcast_to(vector.reshape([-1 if i == axis else 1 for i in axes]), rectangle.sizes)
            flow.ties.append((spread.ravel(), rectangle.flat))
        elif vector is not None:
            flow.locks.append(Lock(vector, "the tensor is cut along another axis", rectangle.node, ""))
    if chosen is None:
        flow.locks.append(
            Lock(rectangle.flat, "no axis of the tensor that it is reshaped to can be cut", rectangle.node, "")
        )
    elif (vector := rectangle.axes[chosen]) is not None and (kind := _kind_of(rectangle, chosen, component, heads)):
        flow.kinds.append((vector, kind))


def _kind_of(rectangle: Rectangle, chosen: int, component: NDArray[np.int64], heads: NDArray[np.bool_]) -> str | None:
    """What a person calls the units of the axis that is cut."""
    of_heads = [vector is not None and bool(heads[component[vector]].any()) for vector in rectangle.axes]
    if of_heads[chosen]:
        return "head"
    if any(of_heads):
        return "value"  # unless it is contracted
    return "group" if chosen == 0 and len(of_heads) == 2 else None


def _free_units(
    grid: NDArray[np.int64], vector: Vector, axis: int, component: NDArray[np.int64], locked: NDArray[np.bool_]
) -> int:
    """How many units a cut along an axis would leave to choose from, after tying each slice and what it holds."""
    if vector is None:
        return 0
    size = len(vector)
    slices = np.moveaxis(grid, axis, 0).reshape(size, -1)
    held = np.concatenate([slices, vector[:, None]], axis=1)
    known, inside = np.unique(component[held], return_inverse=True)
    rows = np.repeat(np.arange(size), held.shape[1])
    links = coo_array((np.ones(len(rows), np.int8), (rows, size + inside.ravel())), shape=(size + len(known),) * 2)
    count, of = connected_components(links, directed=False)
    return int(count - len(np.unique(of[size:][locked[known]])))


def _heads(flow: Flow, component: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The components that are heads: batch axes of products of two activations, and what such an axis is split into."""
    marked = np.zeros(int(component.max(initial=-1)) + 1, bool)
    for vector in flow.heads:
        marked[component[vector]] = True
    while True:
        before = marked.sum()
        for rectangle in flow.rectangles:
            if marked[component[rectangle.flat]].all():
                for axis in rectangle.axes:
                    marked[component[axis if axis is not None else []]] = True
        if marked.sum() == before:
            return marked
