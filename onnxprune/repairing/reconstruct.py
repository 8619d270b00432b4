"""Repair without training: what is left of every layer is fitted to what the uncut layer computed.

For each product, in order: with X its inputs in the cut model and E what its outputs lack against the uncut model's,
the change of its weights is the ridge regression `(X'X + lambda I)^-1 X'E`, with a column of ones for the bias. Inputs
are the cut model's own, with everything before repaired already, so that errors don't pile up (He et al. 2017, Channel
Pruning, section 3.1, equation 5; Luo et al. 2017, ThiNet, equation 7). Labels aren't needed. Nodes that share weights
are fitted together. Recurrent layers are fitted before their gates (`recurrent.py`), scales and shifts of normalisation
channel by channel. Where samples are scarce, lambda is what does best on samples that are held out; a layer that gains
nothing on those is left as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxprune.cutting.plan import Plan
from onnxprune.errors import ModelError
from onnxprune.evaluating.data import Dataset, batches, fixed_batch
from onnxprune.evaluating.evaluate import Batch, run_session
from onnxprune.graph.floats import Twin, in_floats
from onnxprune.graph.model import open_session
from onnxprune.graph.threads import session_options
from onnxprune.repairing.find import Layer, Repaired, find_layers, first_readers, name_of
from onnxprune.repairing.linear import Linear, Target
from onnxprune.repairing.products import Unfit
from onnxprune.repairing.recurrent import Recurrent, Wanted
from onnxprune.repairing.walk import Walk

SAMPLES = 512  # calibration samples
SIZE, FEW = 32, 4  # samples in a batch; in one by which memory is told
ROWS = 16384  # positions that a layer is fitted on, at most
MEMORY = 2**31  # bytes, of which a half is for inner values, a quarter each for uncut outputs and for Gram matrices
TENSORS, COPIES = 3, 4  # inner values of the largest size at once; float64 arrays while a layer is solved for
NARROWEST = 16  # inputs at a time, below which a layer is left alone


def reconstruct(
    model: ir.Model,
    baseline: ir.Model,
    plan: Plan,
    data: Dataset,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    memory: int | None = None,
    note: Callable[[str], None] = lambda text: None,
    share: float = 1.0,
    reading: Collection[str] | None = None,
) -> list[Repaired]:
    """Fits every layer of a cut model that can be, in place; returns what became of each.

    `plan` says what the model lost of `baseline`, whose value names it has. `memory` bounds, in bytes, what is held
    beside the models and the runtime's own: fewer samples and positions, and layers whose Gram matrix would be too
    large are fitted to a part of their inputs after the other; `note` is told of those. Each layer is fitted on up to
    512 samples and 16,384 positions, or a `share` of both. With `reading` only those are that read these values first,
    before any other layer: what a small cut needs, and soon done. A fit that fails leaves its layer as it was, with
    the reason.
    """
    memory = memory or MEMORY
    twin, whole = in_floats(model), in_floats(baseline).model
    found = find_layers(twin.model, whole, plan)
    layers = found.layers if reading is None else first_readers(twin.model, found.layers, reading)
    if not layers or len(data) < (fixed_batch(model) or 1):
        return found.refused
    feeds, wanted = _uncut_outputs(whole, layers, data, threads, (memory, share))
    walk = Walk(twin.model, feeds[: len(wanted[0])], threads)
    if len(wanted[0]) < len(feeds):
        note(f"repair: {len(wanted[0])} of {len(feeds)} batches of calibration data fit into {memory >> 20} MB")
    parted, results = list[str](), list[Repaired]()
    for number, layer in enumerate(layers):
        progress(number + 1, len(layers))
        results.append(_fitted(walk, twin, layer, wanted[number], memory, parted))
        wanted[number] = []
    if parted:
        note(f"repair: {len(parted)} layers were fitted to parts of their inputs for want of memory, as {parted[0]}")
    return results + found.refused


def _fitted(walk: Walk, twin: Twin, layer: Layer, wanted: Sequence[Any], memory: int, parted: list[str]) -> Repaired:
    name = name_of(layer.node)
    undo: Callable[[], None] = lambda: None  # noqa: E731
    try:
        walk.reach(layer.node)
        undo = twin.hold([value for value in layer.weights if value in twin.forms])
        if isinstance(layer, Recurrent):
            return Repaired(name, layer.node.op_type, layer.fit(walk, twin, wanted))
        blocks, left = list(_blocks(layer, memory // 4)), 1.0
        parted += [name] * (len(blocks) != 1)
        if not blocks:
            raise Unfit("memory is too small for a part of its inputs")
        for block in blocks:
            left *= 1 - layer.fit(walk, twin, wanted, block)
        return Repaired(name, layer.kind, 1 - left)
    except (Unfit, ModelError, np.linalg.LinAlgError, MemoryError, ValueError, IndexError) as error:
        undo()
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Repaired(name, layer.node.op_type, None, reason)


def _blocks(layer: Linear, memory: int) -> Iterator[slice]:
    """The inputs of a layer in as few parts as memory allows for Gram matrices; nothing where they'd be too narrow."""
    groups, inputs, outputs = layer.sizes
    numbers = memory // (8 * COPIES * groups)
    widest = int((math.sqrt(outputs**2 + 4 * numbers) - outputs) / 2)
    if widest >= min(NARROWEST, inputs):
        edges = np.linspace(0, inputs, -(-inputs // widest) + 1).astype(int)
        yield from (slice(int(a), int(b)) for a, b in itertools.pairwise(edges))


def _uncut_outputs(
    baseline: ir.Model, layers: list[Layer], data: Dataset, threads: int | None, bounds: tuple[int, float]
) -> tuple[Sequence[Batch], list[list[list[Target] | list[Wanted]]]]:
    """Calibration batches, and what the uncut model computes where each layer ends for as many as memory allows."""
    memory, share = bounds
    positions = int(share * ROWS)
    names = list(dict.fromkeys(name for layer in layers for name in layer.ends))
    given = {value.name for value in baseline.graph.inputs}
    computed = [name for name in names if name not in given]
    graph = ir.convenience.extract(baseline.graph, baseline.graph.inputs, computed)
    session = open_session(ir.Model(graph, ir_version=baseline.ir_version), session_options(threads))
    feeds = _feeds(
        baseline, session, data.take(slice(0, max(fixed_batch(baseline) or SIZE, int(share * SAMPLES)))), memory
    )
    random = np.random.default_rng(0)
    found: list[list[list[Target] | list[Wanted]]] = [[] for _ in layers]
    for number, batch in enumerate(feeds):
        arrays = {**batch, **dict(zip(computed, run_session(session, batch), strict=True))}
        if number >= max(1, memory // 2 // (TENSORS * max(arrays[name].nbytes for name in names))):
            break
        limit = max(1, min(positions, memory // 4 // (4 * sum(layer.widths for layer in layers))) // len(feeds))
        for layer, targets in zip(layers, found, strict=True):
            targets.append(layer.wanted(arrays, limit, random))
    return feeds, found


def _feeds(baseline: ir.Model, session: Any, data: Dataset, memory: int) -> Sequence[Batch]:
    """Calibration batches of equal size, as large as memory allows."""
    fixed, count = fixed_batch(baseline), min(SAMPLES, len(data))
    size = fixed or -(-count // -(-count // SIZE))  # 38 samples are two batches of 19
    if fixed is None and size > FEW:
        few = run_session(session, next(batches(data.take(slice(0, FEW)), FEW)))
        size = max(FEW, min(size, FEW * (memory // 2) // sum(array.nbytes for array in few)))
    return list(batches(data.take(slice(0, count // size * size)), size))
