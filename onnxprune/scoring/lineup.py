"""Lining columns up: what goes together is the k-th best of every row, not what happens to stand at the same place.

Where a tensor is cut by columns, the k-th position of every row goes at once: of every head, of every convolution
group. Rows seldom have to do with one another, so each may be sorted by itself: moving positions inside a row, in all
tensors that hold it, changes nothing that the model computes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnxprune.cutting.plan import Reordering
from onnxprune.cutting.standin import LARGE
from onnxprune.errors import ModelError
from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import comparable_form, relative_difference, run_on_all, tolerance
from onnxprune.graph.model import constant, weight_bytes
from onnxprune.labels.flow import Rectangle
from onnxprune.labels.solve import Solution
from onnxprune.labels.units import Units
from onnxprune.scoring.score import score_units

Ids = NDArray[np.int64]
WHOLE = ("head", "group")  # kinds that are rows themselves
NEIGHBOURS = ("Conv", "LRN")  # where these make a cut inexact, they read neighbouring channels: the order matters


def line_up(units: Units, criterion: str = "l2", seed: int = 0) -> tuple[Reordering, ...]:
    """Sorts every row of the model of `units` in place, its most important column first; returns what was moved.

    The units stay what they were: each is another set of positions now. Nothing is moved where nothing can be sorted,
    where the model holds over 512 MiB of weights, and where the sorted one, run on random inputs, doesn't compute the
    same: where even the order of a sum shows in the outputs.
    """
    model = units.model
    moved = () if weight_bytes(model) > LARGE else sort_rows(units, criterion, seed)
    if not moved:
        return ()
    inputs = [random_inputs(model, seed, batch=None)]
    held = {each.initializer: model.graph.initializers[each.initializer].const_value for each in moved}
    before = run_on_all(comparable_form(model), inputs)
    reorder(model, moved)
    after = run_on_all(comparable_form(model), inputs)
    if all(relative_difference(a, b) <= tolerance(model) for a, b in zip(before, after, strict=True)):
        return moved
    for name, tensor in held.items():
        model.graph.initializers[name].const_value = tensor
    return ()


def sort_rows(units: Units, criterion: str = "l2", seed: int = 0) -> tuple[Reordering, ...]:
    """What moves in each initializer when every row is sorted by importance."""
    return tuple(_reorderings(find_rows(units), criterion, seed))


def reorder(model: ir.Model, reorderings: Iterable[Reordering]) -> None:
    """Moves positions of initializers, in place. Raises `ModelError` for a reordering that doesn't fit."""
    for each in reorderings:
        value = model.graph.initializers.get(each.initializer)
        if value is None or value.const_value is None or not each.fits(tuple(value.const_value.shape.numpy())):
            raise ModelError(f"the plan doesn't fit the model: it reorders {each.initializer!r} along axis {each.axis}")
        value.const_value = ir.Tensor(each.apply(value.const_value.numpy()), dtype=value.dtype, name=value.name)


@dataclass
class Rows:
    """Where every position of a flat axis stands that is cut by columns.

    Atom a stands in row `row[a]`, in part `part[a]` of those that share the order of a row, in the column of component
    `unit[a]`; row is -1 for other atoms. Rows are named by the atoms of the axis that numbers them. `group` numbers the
    groups by component, -1 for what can't be removed; `rows` holds those of each group, one array for each rectangle,
    and `fixed` the groups whose columns can't be moved.
    """

    units: Units
    group: Ids
    row: Ids
    part: Ids
    unit: Ids
    rows: dict[int, list[Ids]]
    fixed: set[int]
    parts: int = 0
    named: Ids = field(default_factory=lambda: np.empty(0, np.int64))  # the one name of every row

    @property
    def solution(self) -> Solution:
        """The analysis that the rows come from."""
        return self.units.solution

    def key(self, row: Ids, part: Ids, unit: Ids) -> Ids:
        """One number for a place."""
        return np.asarray((row * (self.parts + 1) + part) * self.units.count + unit)

    def vectors(self) -> Iterator[tuple[ir.Value, int, Ids, Ids, set[int]]]:
        """(value, axis, atom of each position, unit of each position, groups) wherever columns of a group lie."""
        columns = np.isin(self.group, list(self.rows))
        for value, vectors in self.solution.flow.axes.items():
            for axis, vector in enumerate(vectors):
                if vector is not None:
                    units = self.solution.component[vector]
                    if columns[units].any():
                        groups = np.unique(self.group[units[columns[units]]])
                        yield value, axis, self.solution.atom[vector], units, set(groups.tolist())

    def beside(self, value: ir.Value, axis: int, group: int) -> tuple[int, Ids] | None:
        """Another axis of a value along which the rows of a group lie, and the row at each of its positions."""
        for other, vector in enumerate(self.solution.flow.axes[value]):
            if vector is not None and other != axis:
                atoms = self.solution.atom[vector]
                rows = np.where(self.row[atoms] >= 0, self.row[atoms], self.named[atoms])
                if np.isin(rows, self.rows[group][0]).all():
                    return other, rows
        return None

    def movable(self) -> list[int]:
        """The groups that have several rows, each of which can be sorted."""
        return [group for group, rows in self.rows.items() if group not in self.fixed and len(rows[0]) > 1]

    def name_once(self, links: list[Ids]) -> None:
        """Gives rows that hold the same positions one name."""
        count, pairs = len(self.row), np.concatenate(links or [np.empty((2, 0), np.int64)], 1)
        graph = coo_array((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), shape=(count, count))
        self.named = np.asarray(connected_components(graph, directed=False)[1], np.int64)
        self.row = np.where(self.row >= 0, self.named[self.row], -1)
        self.rows = {group: [np.unique(self.named[each]) for each in sets] for group, sets in self.rows.items()}


def find_rows(units: Units) -> Rows:
    """The rows of everything that is cut by columns, and which columns can't be moved."""
    solution, group = units.solution, np.full(units.count, -1)
    for number, each in enumerate(units.groups):
        group[each.units] = number
    whole = {number for number, each in enumerate(units.groups) if each.kind in WHOLE}
    count = int(solution.atom.max(initial=-1)) + 1
    unit = np.zeros(count, np.int64)
    unit[solution.atom] = solution.component
    rows = Rows(units, group, np.full(count, -1), np.zeros(count, np.int64), unit, {}, whole)
    heads = np.zeros(count, bool)
    for vector in solution.flow.heads:
        heads[solution.atom[vector]] = True
    rows.name_once(
        [links for rectangle, axis in _inside_out(solution) for links in _place(rows, rectangle, axis, heads)]
    )
    for number, sets in rows.rows.items():
        if any(not np.array_equal(each, sets[0]) for each in sets):
            rows.fixed.add(number)
    names = {node.name: node for node in units.model.graph}
    for component, nodes in solution.inexact_nodes.items():
        if any(names[name].op_type in NEIGHBOURS for name in nodes):
            rows.fixed.add(int(group[component]))
    for value, axis, atoms, owners, groups in rows.vectors() if rows.movable() else ():
        for number in groups - rows.fixed:
            inside = group[owners] == number
            if not _can_move(rows, value, axis, number, atoms[inside], owners[inside]):
                rows.fixed.add(number)
    return rows


def _inside_out(solution: Solution) -> list[tuple[Rectangle, int]]:
    """The rectangles, each with the axis along which it is cut; one whose columns are flat themselves after those."""
    rectangles = [
        (rectangle, axis)
        for rectangle in solution.flow.rectangles
        for axis in [a for a in range(len(rectangle.sizes)) if _cut_along(solution, rectangle, a)][:1]
    ]
    holds = np.full(int(solution.atom.max(initial=-1)) + 1, -1)
    for number, (rectangle, _) in enumerate(rectangles):
        holds[solution.atom[rectangle.flat]] = number
    ordered: dict[int, tuple[Rectangle, int]] = {}

    def visit(number: int, path: frozenset[int]) -> None:
        rectangle, axis = rectangles[number]
        for inner in set(np.unique(holds[_atoms(solution, rectangle, axis)]).tolist()) - {-1} - path:
            if inner not in ordered:
                visit(inner, path | {inner})
        ordered.setdefault(number, rectangles[number])

    for number in range(len(rectangles)):
        visit(number, frozenset({number}))
    return list(ordered.values())


def _place(rows: Rows, rectangle: Rectangle, columns: int, heads: NDArray[np.bool_]) -> list[Ids]:
    """Gives every position of a rectangle that is cut along `columns` its place; pairs of rows that are the same."""
    solution, sizes = rows.solution, rectangle.sizes
    atoms, units = solution.atom[rectangle.flat], solution.component[rectangle.flat]
    others = [axis for axis, vector in enumerate(rectangle.axes) if vector is not None and axis != columns]
    groups = set(np.unique(rows.group[units]).tolist()) - {-1}
    if not others or not groups:
        return []
    along = max(others, key=lambda axis: (heads[_atoms(solution, rectangle, axis)].any(), sizes[axis]))
    number = np.indices(sizes).reshape(len(sizes), -1)
    across = _atoms(solution, rectangle, columns)[number[columns]]
    row, part = _atoms(solution, rectangle, along)[number[along]], np.zeros(len(atoms), np.int64)
    nested = rows.row[across[0]] >= 0  # the columns are flat themselves: theirs are the rows
    for axis in set(range(len(sizes))) - {columns, *(() if nested else (along,))}:
        part = part * sizes[axis] + number[axis]
    if nested:
        row, part = rows.row[across], part * (rows.parts + 1) + rows.part[across]
    part = rows.parts + np.unique(part, return_inverse=True)[1].ravel()
    _, first, index = np.unique(atoms, return_index=True, return_inverse=True)
    known = rows.row[atoms] >= 0
    there_row = np.where(known, rows.row[atoms], row[first][index.ravel()])
    there_part = np.where(known, rows.part[atoms], part[first][index.ravel()])
    rows.row[atoms], rows.part[atoms], rows.parts = there_row, there_part, int(part.max()) + 1
    cells, there = rows.key(row, part, 0 * row), rows.key(there_row, there_part, 0 * row)
    _, cell = np.unique(cells, return_inverse=True)
    torn = len(np.unique(np.stack([cell.ravel(), there]), axis=1).T) > int(cell.max()) + 1
    repeated = len(np.unique(rows.key(row, part, units)[first])) < len(first)
    for group in groups:
        rows.rows.setdefault(group, []).append(row)
        if torn or repeated:
            rows.fixed.add(group)
    return [np.unique(np.stack([row, there_row]), axis=1)]


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


def _can_move(rows: Rows, value: ir.Value, axis: int, group: int, atoms: Ids, units: Ids) -> bool:
    """Whether the columns of a group, of which these atoms and units lie along an axis, can be ordered by rows here.

    An initializer must hold whole rows, since something else comes to stand in every place.
    """
    whole, placed = len(rows.units.groups[group].units), rows.row[atoms] >= 0
    if placed.any():
        if not placed.all() or not value.is_initializer():
            return bool(placed.all())
        row, part = rows.row[atoms], rows.part[atoms]
        cells = len(np.unique(rows.key(row, part, 0 * units)))
        return len(np.unique(rows.key(row, part, units))) == len(atoms) == whole * cells
    if len(np.unique(units)) < len(units):
        return False
    if rows.beside(value, axis, group) is None:
        return value.is_initializer() and _constant_along(value, axis)
    return not value.is_initializer() or len(units) == whole


def _constant_along(value: ir.Value, axis: int) -> bool:
    array = constant(value)
    return array is not None and bool((array == array.take([0], axis)).all())


Order = tuple[Ids, Ids]  # the rows of a group, and for each the numbers of its units, the best first


def _orders(rows: Rows, criterion: str, seed: int) -> dict[int, Order]:
    """The units of every movable row by importance: each row is scored as if it were cut by itself."""
    units, solution, movable = rows.units, rows.solution, rows.movable()
    count = units.count
    moved = np.flatnonzero((rows.row >= 0) & np.isin(rows.group[rows.unit], movable))
    keys, inverse = np.unique(rows.row[moved] * count + rows.unit[moved], return_inverse=True)
    alone = np.full(len(rows.row), -1)
    alone[moved] = count + inverse.ravel()
    apart = alone[solution.atom]
    component = np.where(apart >= 0, apart, solution.component)
    ids = {
        number: count + np.searchsorted(keys, rows.rows[number][0][:, None] * count + units.groups[number].units)
        for number in movable
    }
    groups = [replace(each, units=ids[n].ravel()) if n in ids else each for n, each in enumerate(units.groups)]
    single = replace(solution, component=component, locked=np.zeros(count + len(keys), bool))
    scores = score_units(replace(units, solution=single, groups=tuple(groups)), criterion, seed)
    return {
        number: (rows.rows[number][0], np.argsort(-scores[each], axis=1, kind="stable")) for number, each in ids.items()
    }


def _reorderings(rows: Rows, criterion: str, seed: int) -> Iterator[Reordering]:
    """What moves in each initializer."""
    if not rows.movable():
        return
    orders = _orders(rows, criterion, seed)
    rank = np.zeros(rows.units.count, np.int64)
    for each in rows.units.groups:
        rank[each.units] = np.arange(len(each.units))
    for value, axis, atoms, owners, groups in rows.vectors():
        if not value.is_initializer():
            continue
        for number in groups & set(orders):
            names, best = orders[number]
            inside, name = np.flatnonzero(rows.group[owners] == number), value.name or ""
            units, members = owners[inside], rows.units.groups[number].units
            if rows.row[atoms[inside[0]]] >= 0:
                row, part = rows.row[atoms[inside]], rows.part[atoms[inside]]
                taken = members[best[np.searchsorted(names, row), rank[units]]]
                keys = rows.key(row, part, units)
                order, sorting = np.arange(len(atoms)), np.argsort(keys)
                order[inside] = inside[sorting[np.searchsorted(keys, rows.key(row, part, taken), sorter=sorting)]]
                yield Reordering(name, axis, order)
            elif (found := rows.beside(value, axis, number)) is not None:
                along, row = found
                at = np.zeros(len(members), np.int64)
                at[rank[units]] = inside
                order = np.tile(np.arange(len(atoms)), (len(row), 1))
                order[:, inside] = at[best[np.searchsorted(names, row)][:, rank[units]]]
                yield Reordering(name, axis, order, along)
