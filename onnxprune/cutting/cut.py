"""Cutting: every axis keeps the positions whose unit survives; operators that hold sizes get them corrected."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.cutting.plan import Plan, Removal
from onnxprune.graph.model import KEPT, SIZE_BEFORE, release
from onnxprune.labels.flow import Vector, operator_name
from onnxprune.labels.resizing import RESIZES, Cut
from onnxprune.labels.units import Units

SMALL_INTEGERS = {  # quantised: zero has a number of its own there, and the mask follows from what was quantised
    *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT4, ir.DataType.UINT4),
}


def cut(units: Units, alive: NDArray[np.bool_]) -> tuple[ir.Model, Plan]:
    """Removes every component that isn't `alive` from a copy of the model.

    Returns the smaller model and the plan of what went: names in it are values of the model that was analysed.
    """
    solution = units.solution
    alive = alive | solution.locked
    model = units.model.clone()
    originals = {value.name or "": value for value in solution.flow.axes}
    for value in _values(units.model):
        originals.setdefault(value.name or "", value)
    state = Cut(solution, model, alive, originals)
    for node in list(model.graph):
        if (function := RESIZES.get(operator_name(node))) is not None and state.touches(node):
            function(state, node)
    for value in model.graph.initializers.values():
        if value.name in originals and value.const_value is not None:
            _take(value, solution.axes(originals[value.name]), alive)
    for node in model.graph:
        for value in node.outputs:
            value.shape = None if value.shape is not None and not value.is_graph_output() else value.shape
    return model, _plan(units, alive)


def _take(value: ir.Value, axes: tuple[Vector, ...], alive: NDArray[np.bool_]) -> None:
    """Keeps what survives of an initializer: at once, or when it is read where it stands in a file of its own."""
    tensor = value.const_value
    if tensor is None or all(vector is None or alive[vector].all() for vector in axes):
        return
    kept = [None if v is None or alive[v].all() else np.flatnonzero(alive[v]) for v in axes]
    before = tuple(int(dim) for dim in tensor.shape.numpy())
    shape = tuple(size if which is None else len(which) for size, which in zip(before, kept, strict=True))

    def take() -> ir.Tensor[Any]:
        positions = [range(size) if which is None else which for size, which in zip(before, kept, strict=True)]
        while isinstance(positions[-1], range):  # what lies along the last axes goes in one piece
            positions.pop()
        array = tensor.numpy()[np.ix_(*positions)]  # all axes at once: nothing larger than the result is made
        result = ir.Tensor(np.ascontiguousarray(array), dtype=tensor.dtype, name=value.name)
        release(tensor)
        return result

    lazy = isinstance(tensor, ir.ExternalTensor)
    value.const_value = ir.LazyTensor(take, tensor.dtype, ir.Shape(shape), name=value.name) if lazy else take()
    value.shape = ir.Shape(shape)
    value.meta.update({KEPT: kept, SIZE_BEFORE: before})


def _values(model: ir.Model) -> list[ir.Value]:
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph:
        values += [value for value in (*node.inputs, *node.outputs) if value is not None]
    return values


def _plan(units: Units, alive: NDArray[np.bool_]) -> Plan:
    tensors: dict[str, tuple[Removal, ...]] = {}
    for node in units.model.graph:
        for value in node.outputs:
            if not value.name or units.solution.shapes.element_type(value) in SMALL_INTEGERS:
                continue
            removals = []
            shape = units.solution.shapes(value) or ()
            for axis, (vector, size) in enumerate(zip(units.solution.axes(value), shape, strict=True)):
                # a dynamic dimension has labels for one size only: its mask follows from what it is made of
                if vector is not None and size is not None and not alive[vector].all():
                    removals.append(Removal(axis, len(vector), tuple(np.flatnonzero(~alive[vector]).tolist())))
            if removals:
                tensors[value.name or ""] = tuple(removals)
    removed = set(np.flatnonzero(~alive).tolist())
    inexact = {node for unit, nodes in units.solution.inexact_nodes.items() if unit in removed for node in nodes}
    return Plan(tensors, (), tuple(sorted(inexact)))
