"""How important each unit is: one number, from the weights of every tensor that the unit touches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.benchmarking.probe import Probe
from onnxprune.errors import ModelError, UsageError
from onnxprune.graph.model import constant, release
from onnxprune.labels.units import Group, Units, is_parameter, weight_matrix
from onnxprune.scoring.cost import Cost

Scores = NDArray[np.float64]
Scope = Literal["global", "gradual", "layer", "isomorphic", "raw"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

HUGE = 1e15  # numbers from here on mask something: no trained weight is so large
CHUNK = 2**24  # weights that are converted at a time
PASSING = ("DequantizeLinear", "Cast", "Transpose")
WEIGHTED = {  # operator -> the input that is a weight; None: any of them
    "Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": None, "RNN": 1, "GRU": 1, "LSTM": 1, "Gather": 0,
    "Einsum": None, "FusedConv": 1, "FusedGemm": 1, "FusedMatMul": None, "DeformConv": 1, "Attention": 1,
    "DynamicQuantizeLSTM": 1, "MatMulInteger": 1, "ConvInteger": 1, "MatMulNBits": 2,
}  # fmt: skip


def score_units(units: Units, criterion: str = "l2", seed: int = 0) -> Scores:
    """The importance of every component, float64 of shape (units.count,); higher is more important.

    Raises `ModelError` when the criterion needs something that the model lacks, `UsageError` when it isn't known.
    """
    if criterion not in CRITERIA:
        raise UsageError(f"no criterion is called {criterion!r}; known: {', '.join(CRITERIA)}")
    return CRITERIA[criterion](units, seed)


Block = NDArray[np.floating]  # a weight as (before, positions, after) the scored axis


def _l1(weights: Block) -> Scores:
    """Sum of |w| (Li et al. 2017, Pruning Filters for Efficient ConvNets, section 3.1)."""
    return np.asarray(np.abs(weights).sum((0, 2)), np.float64)


def _l2(weights: Block) -> Scores:
    """Squared L2 norm, sum of w^2 (Fang et al. 2023, DepGraph, equation 5)."""
    before, count, after = weights.shape
    rows = weights.reshape(before, count * after)
    if before == 1:
        return np.asarray(np.einsum("na,na->n", weights[0], weights[0]), np.float64)
    return np.asarray(np.einsum("ba,ba->a", rows, rows).reshape(count, after).sum(1), np.float64)


def _sensitivity(weights: Block) -> Scores:
    """|w|_1 / |w|_2: one for a slice that hangs on a single weight, sqrt(n) for one spread evenly (Hoyer 2004)."""
    return np.asarray(_l1(weights) / np.maximum(np.sqrt(_l2(weights)), 1e-30), np.float64)


def _logistic(weights: Block) -> Scores:
    """Mean of 1 / (1 + exp(-|w|)): large weights saturate, so that no single one decides."""
    return np.asarray((1 / (1 + np.exp(-np.abs(weights)))).mean((0, 2)), np.float64)


def _magnitude(weights: Block) -> Scores:
    """Mean of |w|, in the unit of the weights: what a threshold in that unit is compared with."""
    return np.asarray(np.abs(weights).mean((0, 2)), np.float64)


def _signed(weights: Block) -> Scores:
    """Mean of 1 / (1 + exp(-w)) of the signed weights: those below zero, which activations may not pass, go first."""
    return np.asarray((1 / (1 + np.exp(-weights.astype(np.float64)))).mean((0, 2)), np.float64)


def _fpgm(weights: Block) -> Scores:
    """Sum of the distances to all other slices (He et al. 2019, FPGM, equation 4): what others resemble can go."""
    before, count, after = weights.shape
    rows = np.ascontiguousarray(np.moveaxis(weights, 1, 0)).reshape(count, before * after).astype(np.float64)
    squares, step = np.square(rows).sum(1), max(1, CHUNK // count)
    total = np.zeros(count)
    for i in range(0, count, step):
        apart = squares[i : i + step, None] + squares - 2 * rows[i : i + step] @ rows.T
        total[i : i + step] = np.sqrt(np.maximum(apart, 0)).sum(1)
    return total


def _to_mean(own: Scores) -> Scores:
    """Scores of a weight's slices, relative to their mean."""
    return own / max(float(own.mean()), 1e-30)


def _as_they_are(own: Scores) -> Scores:
    return own


def _to_survivors(own: Scores) -> Scores:
    """Scores of a weight's slices, relative to the sum of all that would outlive them.

    Lee et al. 2021, Layer-adaptive Sparsity for the Magnitude-based Pruning (LAMP), equation 3, by slices: the best
    slice of every weight has the same score, so that no layer goes whole.
    """
    order = np.argsort(own, kind="stable")
    outliving = np.cumsum(own[order][::-1])[::-1]
    result = np.empty(len(own))
    result[order] = own[order] / np.maximum(outliving, 1e-30)
    return result


@dataclass(frozen=True)
class Weighing:
    """How a weight's slices are scored: each by itself, or `whole` ones beside each other, and then made `relative`."""

    score: Callable[[Block], Scores]
    whole: bool = False
    relative: Callable[[Scores], Scores] = _to_mean


def _of_weights(weighing: Weighing, units: Units) -> Scores:
    """The sum, over every weight that a unit touches, of its slice's score relative to that weight's other slices.

    Relative, since tensors differ in size and scale; summed, since a unit that many layers read is worth more to keep.
    """
    total, weights = np.zeros(units.count), set(weight_values(units.model))
    for value, axis, vector in units.parameters:
        if value not in weights or units.solution.locked[vector].all():
            continue
        own: Scores = np.bincount(vector, _along(weighing, constant(value), axis), units.count).astype(np.float64)
        release(value.const_value)
        present = np.unique(vector)
        total[present] += weighing.relative(own[present])
    return total


def _along(weighing: Weighing, array: NDArray[Any], axis: int) -> Scores:
    """The score of every slice along an axis, in float32 at least; large weights go in parts where they can."""
    before, count, after = math.prod(array.shape[:axis]), array.shape[axis], math.prod(array.shape[axis + 1 :])
    block = array.reshape(before, count, after)
    step = count if weighing.whole else max(1, CHUNK // max(1, before * after))
    kind = np.float64 if array.dtype == np.float64 else np.float32
    middle = 128 if array.dtype == np.uint8 else 0  # about what zero is stored as
    parts: list[Block] = [block[:, i : i + step].astype(kind, copy=False) for i in range(0, count, step)]
    return np.concatenate([weighing.score(_weights_only(part - kind(middle) if middle else part)) for part in parts])


def _weights_only(block: Block) -> Block:
    """What stands for "never" in a table (minus infinity, the lowest number there is) is a mask and no weight."""
    counts = np.abs(block) < HUGE
    return block if counts.all() else np.where(counts, block, 0).astype(block.dtype)


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


WEIGHT_CRITERIA = {
    "l2": Weighing(_l2),
    "l1": Weighing(_l1),
    "sensitivity": Weighing(_sensitivity),
    "logistic": Weighing(_logistic),
    "fpgm": Weighing(_fpgm, whole=True),
    "lamp": Weighing(_l2, relative=_to_survivors),
    "magnitude": Weighing(_magnitude, relative=_as_they_are),
    "signed": Weighing(_signed, relative=_as_they_are),
}
CRITERIA: dict[str, Callable[[Units, int], Scores]] = {
    **{name: lambda units, seed, w=weighing: _of_weights(w, units) for name, weighing in WEIGHT_CRITERIA.items()},  # type: ignore[misc]
    "bn": _bn,
    "random": _random,
}


def weight_values(model: ir.Model) -> Iterator[ir.Value]:
    """The initializers that activations are multiplied with, biases and normalisation parameters left out.

    Quantised weights count as the integers that they are stored as; packed ones are represented by their scales.
    """
    for node in model.graph:
        if node.op_type in WEIGHTED:
            at = WEIGHTED[node.op_type]
            wanted = (
                node.inputs
                if at is None
                else node.inputs[at : at + (2 if node.op_type in ("GRU", "LSTM", "RNN", "DynamicQuantizeLSTM") else 1)]
            )
            for value in wanted:
                source = stored(value)
                if source is not None and is_parameter(source):
                    yield source


def stored(value: ir.Value | None) -> ir.Value | None:
    """The initializer behind an operand: itself, or what is dequantised, cast or transposed to it."""
    while value is not None and not value.is_initializer():
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in PASSING else None
    return value


Origin = dict[str, tuple[int, float]]  # group -> units in the uncut model, and the factor of its scores


def origin_of(units: Units, target: Probe | None = None) -> Origin:
    """What makes scores of different groups comparable, taken from the uncut model.

    A group's scores, whose mean is about the same everywhere, are divided by the root of what one channel of it costs,
    its share of the time over its channels: dear channels go first. The time is that of a reference machine, or of a
    `target`. A head counts as as many channels as it has, so that heads and hidden units are on one scale. Chosen by
    measurement (docs/architecture.md).
    """
    costs = Cost(units, target).of_groups(units)
    return {
        group.name: (len(group.units), (group.channels / cost) ** 0.5)
        for group, cost in zip(units.groups, costs, strict=True)
    }


def normalise_scores(units: Units, raw: Scores, scope: Scope, origin: Origin | None = None) -> Scores:
    """Scores that compare across groups under one threshold; components that can't be removed get infinity.

    - layer: the rank within the group, in (0,1): a threshold removes the same share of every group;
    - global: the score, weighed by what the group costs and how wide it is (`origin_of`).
      What is left of a group counts for more the smaller it got since `origin`, the uncut model: measured against
      itself alone it would look average again after every round, and be cut until one channel is left;
    - gradual: the same as if cut unit by unit, so that it counts for more with each that goes (as in Lee et al. 2021,
      Layer-adaptive Sparsity for the Magnitude-based Pruning, equation 3);
    - raw: the score as it is, for thresholds in the unit of the weights (`magnitude`, `signed`);
    - isomorphic: the rank within all groups of the same structure (Fang et al. 2024, Isomorphic Pruning, section 3.2).
    """
    result = np.full(units.count, np.inf)
    if scope in ("global", "gradual"):
        origin = origin or origin_of(units)
        for group in units.groups:
            before, factor = origin.get(group.name, (len(group.units), 1.0))
            left = len(group.units) - (0 if scope == "global" else rank(raw[group.units]))
            result[group.units] = raw[group.units] * factor * before / left
        return result
    if scope == "raw":
        ids = np.concatenate([group.units for group in units.groups]) if units.groups else np.empty(0, np.int64)
        result[ids] = raw[ids]
        return result
    classes: dict[object, list[Group]] = {}
    for index, group in enumerate(units.groups):
        classes.setdefault(index if scope == "layer" else _structure(units, group), []).append(group)
    for members in classes.values():
        ids = np.concatenate([group.units for group in members])
        result[ids] = np.where(np.isfinite(raw[ids]), (rank(raw[ids]) + 0.5) / len(ids), np.inf)
    return result


def rank(scores: Scores) -> Scores:
    """How many are lower, or equal and before."""
    rank = np.empty(len(scores))
    rank[np.argsort(scores, kind="stable")] = np.arange(len(scores))
    return rank


def _structure(units: Units, group: Group) -> object:
    """What makes groups isomorphic: their kind and the operators and axes that their parameters serve."""
    roles = []
    for value, axis, vector in units.parameters:
        if np.isin(vector, group.units).any():
            roles += [(node.op_type, position, axis) for node, position in value.uses()]
    return group.kind, tuple(sorted(set(roles)))
