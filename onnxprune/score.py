"""How important each unit is: one number, from the weights of every tensor that the unit touches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.errors import ModelError
from onnxprune.units import Group, Units, weight_matrix

Scores = NDArray[np.float64]
Scope = Literal["layer", "global", "isomorphic"]

WEIGHTED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": None, "RNN": 1, "GRU": 1, "LSTM": 1, "Gather": 0}


def score_units(units: Units, criterion: str = "l2", seed: int = 0) -> Scores:
    """The importance of every component, float64 of shape (units.count,); higher is more important.

    Raises `ModelError` when the criterion needs something that the model lacks, or isn't known.
    """
    if criterion not in CRITERIA:
        raise ModelError(f"no criterion is called {criterion!r}; known: {', '.join(CRITERIA)}")
    return CRITERIA[criterion](units, seed)


def _l1(units: Units, seed: int) -> Scores:
    """Sum of |w| (Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.1), over all tensors of a unit."""
    return _sums(units, np.abs)


def _l2(units: Units, seed: int) -> Scores:
    """Group L2 norm, sqrt(sum w^2) (Fang et al. 2023, DepGraph, equation 5)."""
    return np.sqrt(_sums(units, np.square))


def _sensitivity(units: Units, seed: int) -> Scores:
    """|w|_1 / |w|_2: near one for a unit that hangs on a single weight, sqrt(n) for one spread evenly (Hoyer 2004)."""
    return _sums(units, np.abs) / np.maximum(np.sqrt(_sums(units, np.square)), 1e-30)


def _logistic(units: Units, seed: int) -> Scores:
    """Mean of 1 / (1 + exp(-|w|)): large weights saturate, so that no single one decides."""
    total = _sums(units, lambda w: 1 / (1 + np.exp(-np.abs(w))))
    return total / np.maximum(_sums(units, np.ones_like), 1)


def _bn(units: Units, seed: int) -> Scores:
    """|gamma| of BatchNormalization (Liu et al. 2017, Network Slimming). Units without one are never the first to go.

    Raises `ModelError` for a model without BatchNormalization at a prunable axis.
    """
    total, found = np.zeros(units.count), np.zeros(units.count, bool)
    for node in units.model.graph:
        if node.op_type == "BatchNormalization" and (scale := node.inputs[1]) is not None and scale.is_initializer():
            vector = units.solution.axes(scale)[0]
            if vector is not None:
                np.add.at(total, vector, np.abs(weight_matrix(scale)))
                found[vector] = True
    if not any(found[group.units].all() for group in units.groups):
        raise ModelError("criterion bn needs BatchNormalization after what is pruned; this model has none: use l2")
    return np.where(found, total, np.inf)


def _random(units: Units, seed: int) -> Scores:
    """Uniform noise from the seed: the floor that every criterion must beat."""
    return np.random.default_rng(seed).random(units.count)


CRITERIA: dict[str, Callable[[Units, int], Scores]] = {
    "l1": _l1,
    "l2": _l2,
    "sensitivity": _sensitivity,
    "logistic": _logistic,
    "bn": _bn,
    "random": _random,
}


def _sums(units: Units, function: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Scores:
    """The sum of `function` of all weights that each component touches."""
    total = np.zeros(units.count)
    weights = set(weight_values(units.model))
    for value, axis, vector in units.parameters:
        if value in weights:
            matrix = function(weight_matrix(value))
            others = tuple(i for i in range(matrix.ndim) if i != axis)
            np.add.at(total, vector, matrix.sum(axis=others))
    return total


def weight_values(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers that activations are multiplied with, biases and normalisation parameters left out."""
    for node in model.graph:
        if node.op_type in WEIGHTED:
            at = WEIGHTED[node.op_type]
            wanted = node.inputs if at is None else node.inputs[at : at + (2 if node.op_type in ("GRU", "LSTM", "RNN") else 1)]
            for value in wanted:
                if value is not None and value.is_initializer() and value.dtype is not None and value.dtype.is_floating_point():
                    yield value


def normalise_scores(units: Units, raw: Scores, scope: Scope) -> Scores:
    """Scores that compare across groups under one threshold; components that can't be removed get infinity.

    - layer: the rank within the group, in (0,1): a threshold removes the same share of every group;
    - global: the score over the mean of its group;
    - isomorphic: the rank within all groups of the same structure (Fang et al. 2024, Isomorphic Pruning, section 3.2).
    """
    result = np.full(units.count, np.inf)
    if scope == "global":
        for group in units.groups:
            finite = raw[group.units][np.isfinite(raw[group.units])]
            result[group.units] = raw[group.units] / max(float(finite.mean()) if len(finite) else 1.0, 1e-30)
        return result
    classes: dict[object, list[Group]] = {}
    for index, group in enumerate(units.groups):
        classes.setdefault(index if scope == "layer" else _structure(units, group), []).append(group)
    for members in classes.values():
        ids = np.concatenate([group.units for group in members])
        scaled = np.concatenate([raw[group.units] / max(float(np.mean(raw[group.units])), 1e-30) for group in members])
        if len(members) == 1:
            scaled = raw[ids]
        rank = np.empty(len(ids))
        rank[np.argsort(scaled, kind="stable")] = (np.arange(len(ids)) + 0.5) / len(ids)
        result[ids] = np.where(np.isfinite(raw[ids]), rank, np.inf)
    return result


def _structure(units: Units, group: Group) -> object:
    """What makes groups isomorphic: their kind and the operators and axes that their parameters serve."""
    roles = []
    for value, axis, vector in units.parameters:
        if np.isin(vector, group.units).any():
            roles += [(node.op_type, position, axis) for node, position in value.uses()]
    return group.kind, tuple(sorted(set(roles)))
