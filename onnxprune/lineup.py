"""Lining columns up: what goes together is the k-th best of every row, not what happens to stand at the same place.

Where a tensor is cut by columns, the k-th position of every row goes at once: of every head, of every convolution
group. Rows seldom have to do with one another, so each may be sorted by itself: moving positions inside a row, in all
tensors that hold it, changes nothing that the model computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.data import random_inputs
from onnxprune.errors import ModelError
from onnxprune.evaluate import comparable_form, relative_difference, run_on_all, tolerance
from onnxprune.labels.flow import Rectangle
from onnxprune.labels.solve import Solution
from onnxprune.model import constant, weight_bytes
from onnxprune.plan import Reordering
from onnxprune.score import score_units
from onnxprune.standin import LARGE
from onnxprune.units import Units

Ids = NDArray[np.int64]
WHOLE = ("head", "group")  # kinds that are rows themselves
NEIGHBOURS = ("Conv", "LRN")  # where these make a cut inexact, they read neighbouring channels: the order matters


def line_up(units: Units, criterion: str = "l2", seed: int = 0) -> tuple[ir.Model, tuple[Reordering, ...]]:
    """The model with every row sorted, its most important column first, and the record of what was moved.

    It is the model of `units` itself where nothing can be sorted, where that holds over 512 MiB of weights, and where
    the sorted one, run on random inputs, doesn't compute the same: where even the order of a sum shows in the outputs.
    """
    model = units.model
    moved = () if weight_bytes(model) > LARGE else sort_rows(units, criterion, seed)
    if not moved:
        return model, ()
    ordered = reorder(model, moved)
    inputs = [random_inputs(model, seed, batch=None)]
    before, after = (run_on_all(comparable_form(each), inputs) for each in (model, ordered))
    same = all(relative_difference(a, b) <= tolerance(model) for a, b in zip(before, after, strict=True))
    return (ordered, moved) if same else (model, ())


def sort_rows(units: Units, criterion: str = "l2", seed: int = 0) -> tuple[Reordering, ...]:
    """What moves in each initializer when every row is sorted by importance."""
    return tuple(_reorderings(find_rows(units), criterion, seed))


def reorder(model: ir.Model, reorderings: Iterable[Reordering]) -> ir.Model:
    """A copy of a model with positions of initializers moved. Raises `ModelError` for one that doesn't fit."""
    model = model.clone()
    for each in reorderings:
        value = model.graph.initializers.get(each.initializer)
        if value is None or value.const_value is None or not each.fits(tuple(value.const_value.shape.numpy())):
            raise ModelError(f"the plan doesn't fit the model: it reorders {each.initializer!r} along axis {each.axis}")
        value.const_value = ir.Tensor(each.apply(value.const_value.numpy()), dtype=value.dtype, name=value.name)
    return model


class Place(NamedTuple):
    """Where a position of a flat axis stands: in which row, in which of the parts that share its order, which unit."""

    row: int
    part: tuple[int, ...]
    unit: int


@dataclass(frozen=True)
class Rows:
    """A place for every atom of a flat axis that is cut by columns.

    `group` numbers the groups by component, -1 for what can't be removed; `rows` holds the sets of rows of each group,
    one for each rectangle, and `fixed` the groups whose columns can't be moved. Rows are named by the atoms of the axis
    that numbers them; those that hold the same positions are `same`.
    """

    units: Units
    group: Ids
    places: dict[int, Place]
    rows: dict[int, list[set[int]]]
    same: dict[int, int]
    fixed: set[int]

    def one_of(self, row: int) -> int:
        """The row that stands for all that are the same."""
        while row in self.same:
            row = self.same[row]
        return row

    def of(self, group: int) -> set[int]:
        """The rows of a group."""
        return {self.one_of(row) for row in self.rows[group][0]}

    def vectors(self) -> Iterator[tuple[ir.Value, int, list[int], list[int]]]:
        """(value, axis, atom of each position, unit of each position) wherever columns of a group lie."""
        solution = self.units.solution
        for value, vectors in solution.flow.axes.items():
            for axis, vector in enumerate(vectors):
                if vector is not None and np.isin(self.group[solution.component[vector]], list(self.rows)).any():
                    yield value, axis, solution.atom[vector].tolist(), solution.component[vector].tolist()

    def beside(self, value: ir.Value, axis: int, group: int) -> tuple[int, list[int]] | None:
        """Another axis of a value along which the rows of a group lie, and the row at each of its positions."""
        for other, vector in enumerate(self.units.solution.flow.axes[value]):
            if vector is not None and other != axis:
                atoms = self.units.solution.atom[vector].tolist()
                rows = [self.places[atom].row if atom in self.places else self.one_of(atom) for atom in atoms]
                if set(rows) <= self.of(group):
                    return other, rows
        return None

    def movable(self) -> list[int]:
        """The groups that have several rows, each of which can be sorted."""
        return [group for group in self.rows if group not in self.fixed and len(self.of(group)) > 1]


def find_rows(units: Units) -> Rows:
    """The rows of everything that is cut by columns, and which columns can't be moved."""
    solution, group = units.solution, np.full(units.count, -1)
    for number, each in enumerate(units.groups):
        group[each.units] = number
    whole = {number for number, each in enumerate(units.groups) if each.kind in WHOLE}
    rows = Rows(units, group, {}, {}, {}, whole)
    for rectangle, columns in _inside_out(solution):
        _place(rows, rectangle, columns)
    rows.places.update({atom: Place(rows.one_of(p.row), p.part, p.unit) for atom, p in rows.places.items()})
    for number, sets in rows.rows.items():
        if any({rows.one_of(row) for row in each} != rows.of(number) for each in sets):
            rows.fixed.add(number)
    names = {node.name: node for node in units.model.graph}
    for unit, nodes in solution.inexact_nodes.items():
        if any(names[name].op_type in NEIGHBOURS for name in nodes):
            rows.fixed.add(int(group[unit]))
    for value, axis, atoms, owners in rows.vectors():
        for number in {int(group[unit]) for unit in owners} & set(rows.rows):
            inside = [(atom, unit) for atom, unit in zip(atoms, owners, strict=True) if group[unit] == number]
            if not _can_move(rows, value, axis, number, inside):
                rows.fixed.add(number)
    return rows


def _inside_out(solution: Solution) -> list[tuple[Rectangle, int]]:
    """The rectangles, each with the axis along which it is cut; one whose columns are flat themselves after those."""
    rectangles = [
        (rectangle, axis)
        for rectangle in solution.flow.rectangles
        for axis in [a for a in range(len(rectangle.sizes)) if _cut_along(solution, rectangle, a)][:1]
    ]
    holds = {atom: k for k, (rectangle, _) in enumerate(rectangles) for atom in solution.atom[rectangle.flat].tolist()}
    ordered: dict[int, tuple[Rectangle, int]] = {}

    def visit(k: int, path: frozenset[int]) -> None:
        rectangle, axis = rectangles[k]
        for inner in {holds[atom] for atom in _atoms(solution, rectangle, axis).tolist() if atom in holds} - path:
            if inner not in ordered:
                visit(inner, path | {inner})
        ordered.setdefault(k, rectangles[k])

    for k in range(len(rectangles)):
        visit(k, frozenset({k}))
    return list(ordered.values())


def _place(rows: Rows, rectangle: Rectangle, columns: int) -> None:
    """Gives every position of a rectangle that is cut along `columns` its place."""
    solution, sizes = rows.units.solution, rectangle.sizes
    flat, units = solution.atom[rectangle.flat].tolist(), solution.component[rectangle.flat]
    others = [axis for axis, vector in enumerate(rectangle.axes) if vector is not None and axis != columns]
    groups = {int(group) for group in rows.group[units]} - {-1}
    if not others or not groups:
        return
    number = np.indices(sizes).reshape(len(sizes), -1)
    across = _atoms(solution, rectangle, columns)[number[columns]].tolist()
    heads = np.concatenate([solution.atom[vector] for vector in solution.flow.heads] or [np.empty(0, np.int64)])
    along = max(others, key=lambda axis: (np.isin(_atoms(solution, rectangle, axis), heads).any(), sizes[axis]))
    names = _atoms(solution, rectangle, along)[number[along]].tolist()
    index = np.delete(number, columns if across[0] in rows.places else [columns, along], 0).T.tolist()
    start, into = len(rows.places), dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]]]()
    own, clear = dict[int, Place](), True
    for atom, row, unit, column, rest in zip(flat, names, units.tolist(), across, index, strict=True):
        inner = rows.places.get(column)
        place = (
            Place(row, (start, *rest), unit) if inner is None else Place(inner.row, (start, *rest, *inner.part), unit)
        )
        known = rows.places.setdefault(atom, place)
        if rows.one_of(known.row) != rows.one_of(place.row):
            rows.same[rows.one_of(place.row)] = rows.one_of(known.row)
        clear &= known.unit == unit and into.setdefault(place[:2], known[:2]) == known[:2]
        own[atom] = place
    clear &= len(set(own.values())) == len(own)
    for group in groups:
        rows.rows.setdefault(group, []).append({place.row for place in own.values()})
        if not clear:
            rows.fixed.add(group)


def _cut_along(solution: Solution, rectangle: Rectangle, axis: int) -> bool:
    """Whether a rectangle is cut along an axis: all that is flat in a slice is one unit with it."""
    grid = solution.component[rectangle.flat].reshape(rectangle.sizes)
    vector = rectangle.axes[axis]
    if vector is None:
        return False
    shape = [-1 if index == axis else 1 for index in range(len(rectangle.sizes))]
    return bool((grid == solution.component[vector].reshape(shape)).all())


def _atoms(solution: Solution, rectangle: Rectangle, axis: int) -> Ids:
    vector = rectangle.axes[axis]
    assert vector is not None
    return solution.atom[vector]


def _can_move(rows: Rows, value: ir.Value, axis: int, group: int, inside: list[tuple[int, int]]) -> bool:
    """Whether the columns of a group, of which these (atom, unit) lie along an axis, have an order for each row here.

    An initializer must hold whole rows, since something else comes to stand in every place.
    """
    whole = len(rows.units.groups[group].units)
    known = [rows.places[atom] for atom, _ in inside if atom in rows.places]
    if known:
        unique = len(set(known)) == len(known) == len(inside)
        complete = len(known) == whole * len({(place.row, place.part) for place in known})
        return len(known) == len(inside) and (not value.is_initializer() or (unique and complete))
    if len({unit for _, unit in inside}) < len(inside):
        return False
    if rows.beside(value, axis, group) is None:
        return value.is_initializer() and _constant_along(value, axis)
    return not value.is_initializer() or len(inside) == whole


def _constant_along(value: ir.Value, axis: int) -> bool:
    array = constant(value)
    return array is not None and bool((array == array.take([0], axis)).all())


Orders = dict[int, dict[int, list[int]]]  # group -> row -> its units, the best first


def _orders(rows: Rows, criterion: str, seed: int) -> Orders:
    """The units of every movable row by importance: each row is scored as if it were cut by itself."""
    units, solution, movable = rows.units, rows.units.solution, set(rows.movable())
    ids: dict[tuple[int, int], int] = {}
    component = solution.component.copy()
    apart = np.full(int(solution.atom.max(initial=0)) + 1, -1)
    for atom, place in rows.places.items():
        if rows.group[place.unit] in movable:
            apart[atom] = ids.setdefault((place.row, place.unit), units.count + len(ids))
    alone = apart[solution.atom] >= 0
    component[alone] = apart[solution.atom][alone]
    single = replace(solution, component=component, locked=np.zeros(units.count + len(ids), bool))
    groups = [
        replace(each, units=np.array([ids[row, unit] for row in rows.of(number) for unit in each.units.tolist()]))
        if number in movable
        else each
        for number, each in enumerate(units.groups)
    ]
    scores = score_units(replace(units, solution=single, groups=tuple(groups)), criterion, seed)
    return {
        number: {
            row: sorted(units.groups[number].units.tolist(), key=lambda unit, row=row: -scores[ids[row, unit]])  # type: ignore[misc]
            for row in rows.of(number)
        }
        for number in movable
    }


def _reorderings(rows: Rows, criterion: str, seed: int) -> Iterator[Reordering]:
    """What moves in each initializer."""
    if not rows.movable():
        return
    orders = _orders(rows, criterion, seed)
    takes = {  # (row, unit) -> the unit that comes to stand there
        (row, unit): taken
        for number, by_row in orders.items()
        for row, order in by_row.items()
        for unit, taken in zip(rows.units.groups[number].units.tolist(), order, strict=True)
    }
    for value, axis, atoms, owners in rows.vectors():
        if not value.is_initializer():
            continue
        for number in {int(rows.group[unit]) for unit in owners} & set(orders):
            inside = [k for k, unit in enumerate(owners) if rows.group[unit] == number]
            name = value.name or ""
            if atoms[inside[0]] in rows.places:
                at = {rows.places[atoms[k]]: k for k in inside}
                order = np.arange(len(atoms))
                for place, k in at.items():
                    order[k] = at[Place(place.row, place.part, takes[place.row, place.unit])]
                yield Reordering(name, axis, order)
            elif (found := rows.beside(value, axis, number)) is not None:
                along, rows_there = found
                column = {owners[k]: k for k in inside}
                order = np.tile(np.arange(len(atoms)), (len(rows_there), 1))
                for index, row in enumerate(rows_there):
                    for unit, k in column.items():
                        order[index, k] = column[takes[row, unit]]
                yield Reordering(name, axis, order, along)
