"""Prunable units and their groups: what the solver's components mean for a person, a score and a cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Final, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.checks import check_option
from onnxprune.errors import ModelError, UsageError
from onnxprune.graph.model import constant
from onnxprune.labels import Solution, analyse
from onnxprune.labels.flow import integer
from onnxprune.labels.solve import Granularity

KINDS = ("width", "residual", "group", "value", "qk", "head", "hidden", "layer")  # the later goes before the earlier


Kernels = Literal["none", "spatial", "pointwise"]
KERNELS: Final[tuple[Kernels, ...]] = ("none", "spatial", "pointwise")  # "pointwise": 1x1, or depthwise


@dataclass(frozen=True)
class Group:
    """Units that are interchangeable: they lie along the same axes of the same tensors."""

    name: str
    units: NDArray[np.int64]
    kind: str
    exact: bool
    members: tuple[str, ...]
    kernels: Kernels  # the narrowest of the convolutions that it feeds or leaves, where runtimes like round widths
    repeats: int  # positions of one unit along its shortest axis
    channels: int  # positions of all units along a typical axis of their parameters; a head has many


@dataclass(frozen=True)
class Units:
    """The prunable units of a model. A unit is a component of labels; `groups` hold the prunable ones."""

    solution: Solution
    groups: tuple[Group, ...]

    @property
    def model(self) -> ir.Model:
        """The model that was analysed."""
        return self.solution.flow.model

    @cached_property
    def parameters(self) -> list[tuple[ir.Value, int, NDArray[np.int64]]]:
        """(initializer, axis, components along it) for every axis of a parameter that can be cut."""
        found = []
        for value in self.model.graph.initializers.values():
            if value in self.solution.flow.axes and is_parameter(value):
                for axis, vector in enumerate(self.solution.axes(value)):
                    if vector is not None:
                        found.append((value, axis, vector))
        return found

    @property
    def count(self) -> int:
        """The number of components, prunable or not; arrays of scores have this length."""
        return len(self.solution.locked)


def find_units(solution: Solution) -> Units:
    """Groups the components that can be removed by the axes that they lie along."""
    signature = np.zeros(len(solution.locked), np.uint64)
    repeats = np.full(len(solution.locked), np.iinfo(np.int64).max)
    seen: set[bytes] = set()
    random = np.random.default_rng(0)
    owners: list[tuple[NDArray[np.int64], str]] = []
    for value in solution.flow.axes:
        for vector in solution.axes(value):
            if vector is None:
                continue
            present, counts = np.unique(vector, return_counts=True)
            if value.is_initializer() and not _is_fill(value):
                owners.append((vector, value.name or ""))
            if vector.tobytes() not in seen:
                seen.add(vector.tobytes())
                with np.errstate(over="ignore"):
                    np.add.at(signature, vector, random.integers(1, 2**63, dtype=np.uint64))
                repeats[present] = np.minimum(repeats[present], counts)
    return Units(solution, tuple(_groups(solution, signature, repeats, owners)))


def _groups(
    solution: Solution,
    signature: NDArray[np.uint64],
    repeats: NDArray[np.int64],
    owners: list[tuple[NDArray[np.int64], str]],
) -> list[Group]:
    free = np.flatnonzero(~solution.locked & (signature != 0))
    if not len(free):
        return []
    _, group_of = np.unique(signature[free], return_inverse=True)
    index = np.full(len(solution.locked), -1)
    index[free] = group_of
    count = int(group_of.max()) + 1
    names: list[list[str]] = [[] for _ in range(count)]
    positions: list[list[int]] = [[] for _ in range(count)]
    for vector, name in owners:
        for group, times in zip(*np.unique(index[vector], return_counts=True), strict=True):
            if group >= 0:
                names[group].append(name)
                positions[group].append(int(times))
    kinds = ["width"] * count
    for labels, kind in sorted(solution.flow.kinds, key=lambda pair: KINDS.index(pair[1])):
        for group in np.unique(index[solution.component[labels]]):
            if group >= 0:
                kinds[group] = kind
    kernels = _kernels(solution, index, count)
    groups = []
    for group in np.unique(group_of):
        if not names[group]:  # nothing that was trained
            continue
        units = free[group_of == group]
        exact = not any(int(unit) in solution.inexact_nodes for unit in units)
        label = names[group][0]
        members = tuple(dict.fromkeys(names[group]))
        groups.append(
            Group(
                label,
                units,
                kinds[group],
                exact,
                members,
                KERNELS[kernels[group]],
                int(repeats[units].min()),
                int(np.median(positions[group] or [len(units)])),
            )
        )
    return sorted(groups, key=lambda group: int(group.units[0]))


def _kernels(solution: Solution, index: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """For each group the position in `KERNELS` of the narrowest convolution that reads or writes it."""
    found = np.zeros(count, np.int64)
    for node in solution.flow.model.graph:
        if node.op_type not in ("Conv", "ConvTranspose") or node.inputs[1] is None:
            continue
        weight = solution.shapes.concrete(node.inputs[1])
        depthwise = weight is not None and weight[1] == 1 and integer(node, "group", 1) > 1
        spatial = weight is None or (math.prod(weight[2:]) > 1 and not depthwise)
        for value in (node.inputs[0], node.outputs[0]):
            for vector in solution.axes(value) if value is not None else ():
                if vector is not None:
                    groups = index[vector][index[vector] >= 0]
                    found[groups] = np.maximum(found[groups], 1 if spatial else 2)
    return found


def of_kinds(units: Units, kinds: Sequence[str]) -> Units:
    """The same units, of which only groups of these kinds can be pruned; all kinds when none is named.

    Raises `UsageError` for a kind that doesn't exist and `ModelError` when the model has none of them.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UsageError(f"--kinds {unknown[0]}: no such kind; known: {', '.join(KINDS)}")
    if not kinds:
        return units
    groups = tuple(group for group in units.groups if group.kind in kinds)
    if not groups:
        present = sorted({group.kind for group in units.groups})
        raise ModelError(f"the model has no groups of kind {', '.join(kinds)}; it has {', '.join(present) or 'none'}")
    return replace(units, groups=groups)


def unprotected(units: Units, patterns: Sequence[str]) -> Units:
    """The same units, without the groups that would cut a protected parameter (`protected`)."""
    if not patterns:
        return units
    fixed = {value.name for value in protected(units.model, patterns)}
    return replace(units, groups=tuple(group for group in units.groups if not fixed.intersection(group.members)))


def protected(model: ir.Model, patterns: Sequence[str]) -> list[ir.Value]:
    """The parameters whose name, or a node of theirs, matches one of these patterns (`*`, `?`, `[abc]`).

    Raises `UsageError` for a pattern that matches nothing.
    """
    names = {
        value: {value.name or "", *(user.name or "" for user in value.consumers())}
        for value in model.graph.initializers.values()
    }
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for each in names.values() for name in each):
            raise UsageError(
                f"--protect {pattern}: no initializer and no node with one has such a name; 'inspect' lists the groups"
            )
    return [v for v, each in names.items() if any(fnmatchcase(name, p) for p in patterns for name in each)]


def granularity_for(granularity: Granularity, kinds: Sequence[str]) -> Granularity:
    """Columns where the insides of heads are asked for and heads themselves aren't; else what is given."""
    inside = {"qk", "value"} & set(kinds)
    return "columns" if granularity == "auto" and inside and "head" not in kinds else granularity


def chosen_units(model: ir.Model, granularity: Granularity, kinds: Sequence[str], protect: Sequence[str]) -> Units:
    """The units of a normalised model that a run may remove; perhaps none. Raises as `of_kinds` and `protected` do."""
    return unprotected(of_kinds(find_units(analyse(model, granularity_for(granularity, kinds))), kinds), protect)


def prunable(
    model: ir.Model,
    name: str,
    granularity: Granularity = "auto",
    kinds: Sequence[str] = (),
    protect: Sequence[str] = (),
) -> Units:
    """The units of a normalised model. Raises `ModelError` with the reasons when nothing can be pruned."""
    check_option("kinds", kinds, tuple[str, ...])
    check_option("protect", protect, tuple[str, ...])
    units = chosen_units(model, granularity, kinds, protect)
    if protect and not units.groups:
        raise ModelError(f"{name}: everything that could be pruned is protected; give narrower patterns to --protect")
    if not any(len(group.units) > 1 for group in units.groups):
        reasons = sorted({lock.reason for lock in units.solution.lock_reasons().values()})
        raise ModelError(
            f"{name}: nothing can be pruned: {'; '.join(reasons[:4]) or 'it has no channels'}. "
            "'onnxprune inspect' lists what is locked and why"
        )
    return units


def fading_parts(units: Units, alive: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """What a cut takes of each parameter: boolean arrays of the parameters' shapes, by name."""
    found: dict[str, NDArray[np.bool_]] = {}
    for value, axis, vector in units.parameters:
        if value.const_value is not None and not alive[vector].all():
            shape = tuple(int(dim) for dim in value.const_value.shape.numpy())
            gone = ~alive[vector].reshape([-1 if at == axis else 1 for at in range(len(shape))])
            found[value.name or ""] = found.get(value.name or "", np.zeros(shape, bool)) | gone
    return found


QUANTISED = {
    "DequantizeLinear": (0,),
    "MatMulInteger": (0, 1),
    "ConvInteger": (0, 1),
    "MatMulNBits": (1,),
    "DynamicQuantizeLSTM": (1, 2),
}


def is_parameter(value: ir.Value) -> bool:
    """Whether an initializer holds floating-point numbers or quantised weights that were trained."""
    if value.dtype is None or value.dtype.is_floating_point():
        return value.dtype is not None and not _is_fill(value)
    return any(position in QUANTISED.get(node.op_type, ()) for node, position in value.uses())


def _is_fill(value: ir.Value) -> bool:
    """Whether an initializer is one number repeated, to be expanded: a state of zeros, say."""
    if not value.uses() or any(node.op_type != "Expand" for node in value.consumers()):
        return False
    array = constant(value)
    return array is not None and bool((array == array.flat[0]).all() if array.size else True)


def weight_matrix(value: ir.Value) -> NDArray[np.float64]:
    """An initializer's numbers in float64."""
    return np.asarray(constant(value), np.float64)
