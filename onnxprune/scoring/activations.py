"""Scores from what the model does on calibration data: how large, and how varied, what each layer reads is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.evaluating.data import Dataset, batches, fixed_batch
from onnxprune.evaluating.evaluate import run_session
from onnxprune.graph.model import open_session
from onnxprune.graph.threads import session_options
from onnxprune.labels.flow import operator_name
from onnxprune.labels.recurrent import GATES
from onnxprune.labels.units import Units, weight_matrix
from onnxprune.repairing.products import product_of
from onnxprune.scoring.score import Scores, stored, weight_values

SAMPLES, SIZE = 128, 8  # calibration samples, and how many run at a time

WIDEST = 8192  # channels, beyond which an axis isn't looked at
DAMPING = 1e-3  # of the mean of the Gram matrix's diagonal

Vector = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Reading:
    """An axis of an activation that a layer multiplies with a weight: components along it, and that weight.

    `meets` is the axis of the weight that it is summed up with, where that is known.
    """

    value: ir.Value
    axis: int
    vector: Vector
    weight: ir.Value
    meets: int | None = None


def mean_magnitude(units: Units, data: Dataset) -> Scores:
    """The mean of |a| over calibration data, summed over every layer that reads it, relative to the layer's mean.

    Mean activation (Molchanov et al. 2017, Pruning CNNs for Resource Efficient Inference, section 2.2).
    """
    total = np.zeros(units.count)
    for reading, magnitude in _averages(units, data, lambda rows: np.abs(rows).mean(1)):
        _add(total, reading, _by_component(reading, magnitude, units.count))
    return total


def fluctuation(units: Units, data: Dataset) -> Scores:
    """The variance of what a layer reads times the squared norm of the weights that read it, summed over the layers.

    An et al. 2024, FLAP, the weighted fluctuation metric: what hardly varies can go into the bias of its reader.
    """
    total = np.zeros(units.count)
    for reading, (mean, square) in _averages(
        units, data, lambda rows: np.stack([rows.mean(1), np.square(rows).mean(1)])
    ):
        variance = _by_component(reading, np.maximum(square - mean**2, 0), units.count)
        _add(total, reading, variance * _reading_norms(units, reading))
    return total


def reconstruction_error(units: Units, data: Dataset) -> Scores:
    """What the output of each reader lacks when a channel goes and the others make up for it, summed over the readers.

    `|w_c|^2 / [G^-1]_cc`, with G the Gram matrix of what is read: Hassibi and Stork 1993, Optimal Brain Surgeon,
    equation 5, for a column at a time. The taps of a convolution share the Gram matrix of its channels.
    """
    total = np.zeros(units.count)
    for reading, gram in _averages(units, data, lambda rows: rows @ rows.T / rows.shape[1]):
        damped = gram + DAMPING * max(float(np.trace(gram)) / len(gram), 1e-12) * np.eye(len(gram))
        alone = _by_component(reading, 1 / np.diag(np.linalg.inv(damped)), units.count)
        _add(total, reading, alone * _reading_norms(units, reading))
    return total


def _by_component(reading: Reading, numbers: NDArray[np.float64], count: int) -> Scores:
    return np.bincount(reading.vector, numbers, count).astype(np.float64)


def _add(total: Scores, reading: Reading, own: Scores) -> None:
    present = np.unique(reading.vector)
    total[present] += own[present] / max(float(own[present].mean()), 1e-30)


def _reading_norms(units: Units, reading: Reading) -> Scores:
    """The squared norm, by component, of the weight along the axis that meets the activation's."""
    meeting = [
        (axis == reading.meets, value, axis, vector)
        for value, axis, vector in units.parameters
        if value is reading.weight and np.isin(vector, reading.vector).any()
    ]
    if not meeting:
        return np.ones(units.count)
    _, value, axis, vector = max(meeting, key=lambda each: each[0])
    norms = np.square(weight_matrix(value)).sum(
        tuple(other for other in range(len(value.shape or ())) if other != axis)
    )
    return np.bincount(vector, norms, units.count).astype(np.float64)


def _readings(units: Units) -> Iterator[Reading]:
    weights = set(weight_values(units.model))
    for node in units.model.graph:
        recurrent = stored(node.inputs[2]) if operator_name(node) in GATES else None
        if recurrent in weights and recurrent is not None and node.outputs[0].name:
            states = node.outputs[0]
            vector = (units.solution.axes(states) or (None,))[-1]
            if vector is not None and not units.solution.locked[vector].all():
                yield Reading(states, 3, vector, recurrent, 2)  # a layer reads its own states
        sources = [stored(value) for value in node.inputs]
        weight = next((source for source in sources if source in weights), None)
        if weight is None:
            continue
        product = product_of(node)
        for value, source in zip(node.inputs, sources, strict=True):
            if value is None or source is not None or value.is_graph_input():
                continue
            for axis, vector in enumerate(units.solution.axes(value)):
                if vector is not None and not units.solution.locked[vector].all():
                    yield Reading(value, axis, vector, weight, product.meets if product is not None else None)


def _averages(
    units: Units, data: Dataset, measure: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> Iterator[tuple[Reading, NDArray[np.float64]]]:
    """Of every reading, the mean over batches of what `measure` makes of it, as (positions along its axis, samples)."""
    readings = [reading for reading in _readings(units) if len(reading.vector) <= WIDEST]
    names = list(dict.fromkeys(reading.value.name or "" for reading in readings))
    if not names:
        return
    graph = ir.convenience.extract(units.model.graph, units.model.graph.inputs, names)
    session = open_session(ir.Model(graph, ir_version=units.model.ir_version), session_options(None))
    size = fixed_batch(units.model) or SIZE
    totals: dict[Reading, NDArray[np.float64]] = {}
    count = 0
    for batch in batches(data.take(slice(0, max(size, SAMPLES // size * size))), size):
        found = dict(zip(names, run_session(session, batch), strict=True))
        for reading in readings:
            array = np.moveaxis(found[reading.value.name or ""].astype(np.float64, copy=False), reading.axis, 0)
            rows = array.reshape(len(array), -1)
            if len(rows) == len(reading.vector):
                totals[reading] = totals.get(reading, 0.0) + measure(rows)
        count += 1
    for reading, total in totals.items():
        yield reading, total / count


ACTIVATION_CRITERIA: dict[str, Callable[[Units, Dataset], Scores]] = {
    "activation": mean_magnitude,
    "flap": fluctuation,
    "obs": reconstruction_error,
}
