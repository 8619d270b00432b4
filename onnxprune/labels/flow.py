"""The state that rules read and write: labels on axes, ties between labels, locks with reasons.

Every axis of every tensor that can be cut carries a vector with one label (an integer) for each position; an axis that
can't be cut carries None. A rule gives the axes of a node's outputs their vectors and records what it learnt:

- `tie(a, b)`: position i of one and position i of the other live and die together;
- `lock(a, reason)`: none of these positions can go;
- `rectangle(flat, axes)`: `flat` is the same data as a tensor with these axes, row by row (a reshape, or channels in
  groups). Such a tensor must stay rectangular, so only one of the axes can be cut; the solver chooses which;
- `inexact(a)`: cutting here changes what is left (a mean over channels), so it isn't the same as a mask.

A dynamic dimension has labels where something that can be cut is folded into it, such as heads into the batch: as many
as it has positions in the first shape walk, in a pattern that repeats.

Initializers get fresh labels on all their axes when a rule first asks for them, and ties do the rest. So a rule needs
no case for constants: a bias is tied like any other operand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.graph.attributes import given, integer, integers, operator_name, text
from onnxprune.graph.model import constant
from onnxprune.graph.shapes import Shape, Shapes

Vector = NDArray[np.int64] | None
Rule = Callable[["Flow", ir.Node], None]

__all__ = ["Flow", "given", "integer", "integers", "operator_name", "rule", "text"]

RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Registers how labels flow through these operators ("Conv", or "domain::Name" outside the default domain)."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


@dataclass(frozen=True)
class Lock:
    """Labels that can't be removed, and why."""

    labels: NDArray[np.int64]
    reason: str
    node: str
    value: str


@dataclass(frozen=True)
class Rectangle:
    """`flat` holds, row by row, a tensor with these axes. `rows` is the index of the axis to prefer, if any."""

    flat: NDArray[np.int64]
    axes: tuple[Vector, ...]
    sizes: tuple[int, ...]
    node: str
    prefer: int | None = None


@dataclass
class Flow:
    """One walk over a graph. `axes` holds, per value, one vector (or None) for each axis."""

    model: ir.Model
    shapes: Shapes
    axes: dict[ir.Value, tuple[Vector, ...]] = field(default_factory=dict)
    ties: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=list)
    locks: list[Lock] = field(default_factory=list)
    rectangles: list[Rectangle] = field(default_factory=list)
    inexact_labels: list[tuple[NDArray[np.int64], str]] = field(default_factory=list)
    heads: list[NDArray[np.int64]] = field(default_factory=list)  # batch axes of products of two activations
    kinds: list[tuple[NDArray[np.int64], str]] = field(default_factory=list)
    ended: list[NDArray[np.int64]] = field(default_factory=list)  # by the node at work
    count: int = 0
    node: ir.Node | None = None
    asked: set[ir.Value] = field(default_factory=set)  # what the rule at work has looked at

    def fresh(self, size: int | None) -> Vector:
        """New labels for an axis; None for a size of one (it can't be cut) or an unknown size."""
        return None if size is None or size <= 1 else self.new(size)

    def new(self, size: int) -> NDArray[np.int64]:
        """New labels, as many as asked."""
        self.count += size
        return np.arange(self.count - size, self.count, dtype=np.int64)

    def shape(self, value: ir.Value | None) -> Shape | None:
        """The shape of a value, None for dynamic dimensions; None when unknown."""
        return None if value is None else self.shapes(value)

    def sizes(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The sizes of a value in the first shape walk, dynamic dimensions too; None when unknown."""
        return None if value is None else self.shapes.concrete(value)

    def of(self, value: ir.Value | None) -> tuple[Vector, ...]:
        """The vectors of a value's axes; fresh ones for an initializer that is asked for the first time."""
        if value is None:
            return ()
        self.asked.add(value)
        if value not in self.axes:
            shape = self.shape(value) or ()
            parameter = value.is_initializer() and not value.is_graph_input()
            self.axes[value] = tuple(self.fresh(size) if parameter else None for size in shape)
        return self.axes[value]

    def give(self, value: ir.Value, vectors: Sequence[Vector]) -> None:
        """Sets the vectors of a computed value's axes."""
        sizes = self.sizes(value)
        if sizes is None or len(sizes) != len(vectors):
            self.lock_all(vectors, "its shape is unknown after this operator")
            return
        checked: list[Vector] = []
        for vector, size in zip(vectors, sizes, strict=True):
            if vector is not None and len(vector) != size:
                self.lock(vector, "the operator changes this axis in a way that isn't understood")
                vector = None
            checked.append(vector)
        self.axes[value] = tuple(checked)

    def fixed(self, value: ir.Value | None, axis: int) -> Vector:
        """The labels of an axis whose positions an operator names; none, after a lock, where its size is dynamic."""
        vector, shape = self.of(value)[axis], self.shape(value)
        if vector is None or (shape is not None and shape[axis] is not None):
            return vector
        self.lock(vector, "positions of a dynamic dimension are named", value)
        return None

    def tie(self, a: Vector, b: Vector, reason: str = "the other operand can't be cut along this axis") -> None:
        """Position i of `a` and position i of `b` live and die together; an uncut side locks the other."""
        if a is None or b is None or len(a) != len(b):
            self.lock(a, reason)
            self.lock(b, reason)
        else:
            self.ties.append((a, b))

    def lock(self, vector: Vector, reason: str, value: ir.Value | None = None) -> None:
        """None of these positions can be removed."""
        if vector is not None and len(vector):
            node = self.node.name or "" if self.node is not None else ""
            self.locks.append(Lock(vector, reason, node, (value.name or "") if value else ""))

    def lock_all(self, vectors: Sequence[Vector], reason: str) -> None:
        """Locks every one of these axes."""
        for vector in vectors:
            self.lock(vector, reason)

    def end(self, vector: Vector) -> None:
        """These positions go no further, and nothing that is left hangs on them: they are summed up, or not read."""
        if vector is not None:
            self.ended.append(vector)

    def inexact(self, vector: Vector) -> None:
        """Removing these positions changes what this node computes for the others."""
        if vector is not None and self.node is not None:
            self.inexact_labels.append((vector, self.node.name or ""))

    def rectangle(self, flat: Vector, axes: Sequence[Vector], sizes: Sequence[int], prefer: int | None = None) -> None:
        """`flat` is a tensor with these axes, row by row; only one of them can be cut."""
        if flat is None:
            self.lock_all(axes, "the axis that it is a part of can't be cut")
        else:
            name = self.node.name or "" if self.node is not None else ""
            self.rectangles.append(Rectangle(flat, tuple(axes), tuple(sizes), name, prefer))

    def ints(self, node: ir.Node, index: int) -> list[int] | None:
        """The integers in a constant input; None when it is absent or computed."""
        value = node.inputs[index] if index < len(node.inputs) else None
        array = constant(value)
        return None if array is None else [int(x) for x in np.ravel(array)]
