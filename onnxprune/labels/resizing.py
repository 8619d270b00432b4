"""What a cut corrects in operators that hold sizes: the rules, under `@resize`, and what they may ask and change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.graph.model import constant
from onnxprune.graph.shapes import add_initializer
from onnxprune.labels.flow import Vector
from onnxprune.labels.solve import Solution


@dataclass(frozen=True)
class Cut:
    """A cut in progress. `alive` says which components survive."""

    solution: Solution
    model: ir.Model
    alive: NDArray[np.bool_]
    originals: dict[str, ir.Value]

    def axes(self, value: ir.Value | None) -> tuple[Vector, ...]:
        """The components along each axis of a value."""
        original = self.originals.get(value.name or "") if value is not None else None
        return self.solution.axes(original) if original is not None else ()

    def touches(self, node: ir.Node) -> bool:
        """Whether anything is removed from what a node reads or makes."""
        values = (*node.inputs, *node.outputs)
        return any(v is not None and not self.alive[v].all() for value in values for v in self.axes(value))

    def is_kept(self, vector: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which positions of an axis survive."""
        return self.alive[vector]

    def kept_before(self, vector: NDArray[np.int64], position: int) -> int:
        """How many positions survive before `position`."""
        return int(self.alive[vector[:position]].sum())

    def size_before(self, value: ir.Value | None, axis: int) -> int:
        """The size of an axis before the cut."""
        vector = self.axes(value)[axis]
        if vector is not None:
            return len(vector)
        assert value is not None
        return (self.solution.shapes(self.originals[value.name or ""]) or ())[axis] or 0

    def size(self, value: ir.Value | None, axis: int, default: int | None = None) -> int:
        """The size of an axis after the cut; `default` for an axis that can't be cut."""
        axes = self.axes(value)
        vector = axes[axis] if axis < len(axes) else None
        if vector is not None:
            return int(self.alive[vector].sum())
        return self.size_before(value, axis) if default is None else default

    def ints(self, node: ir.Node, index: int) -> list[int] | None:
        """The integers in a constant input; None when it is absent or computed."""
        array = constant(node.inputs[index]) if index < len(node.inputs) else None
        return None if array is None else [int(x) for x in np.ravel(array)]

    def set_ints(self, node: ir.Node, index: int, values: list[int]) -> None:
        """Replaces a constant integer input."""
        if self.ints(node, index) == values:
            return
        while len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        old = node.inputs[index]
        dtype = old.dtype.numpy() if old is not None and old.dtype is not None else np.int64
        array = np.array(values, dtype)
        if old is not None and old.shape is not None and math.prod(old.shape.numpy()) == array.size:
            array = array.reshape(old.shape.numpy())
        node.replace_input_with(index, add_initializer(self.model, f"{node.name}.sizes", array))
        if old is not None and not old.uses():
            self.model.graph.initializers.pop(old.name or "", None)

    def pick(self, node: ir.Node, axis: int, positions: list[int]) -> None:
        """Puts a Gather of these positions in front of a node's first input."""
        indices = add_initializer(self.model, f"{node.name}.picked", np.array(positions, np.int64))
        gather = ir.node("Gather", [node.inputs[0], indices], {"axis": axis}, name=f"{node.name}.pick{axis}")
        gather.outputs[0].name = gather.name
        self.model.graph.insert_before(node, gather)
        node.replace_input_with(0, gather.outputs[0])


Resize = Callable[[Cut, ir.Node], None]
RESIZES: dict[str, Resize] = {}


def resize(*operators: str) -> Callable[[Resize], Resize]:
    """Registers what a cut must correct in these operators: attributes and constant inputs that hold sizes."""

    def register(function: Resize) -> Resize:
        RESIZES.update(dict.fromkeys(operators, function))
        return function

    return register
