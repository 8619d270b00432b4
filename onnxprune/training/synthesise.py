"""Calibration inputs for those who have no data: noise, changed until batch normalisation sees what it saw in training.

Where a model has none, noise like images and signals: `noise_dataset`.

Cai et al. 2020, ZeroQ, section 3.1, equation 1: with m and v the mean and variance over a batch of what a
BatchNormalization reads, the loss is the sum over all of them of the distance to the mean and variance that it holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.errors import TrainingError
from onnxprune.evaluating.data import Dataset, fixed_batch, model_inputs, random_dataset, random_inputs
from onnxprune.graph.model import constant
from onnxprune.graph.shapes import Shapes, add_initializer, replace_node
from onnxprune.training import TrainingOptions, minimise
from onnxprune.training.lowering import at_sizes, behind, lower, spell_out

IMAGES = "onnxprune.inputs"
MOST, FEWEST, SHARD = 256, 32, 32  # inputs; as many as a thread of the worker takes at a time
STEPS, LEAST_STEPS, RATE = 60, 20, 0.2
BUDGET = 4e12  # multiply-accumulates that all steps may take, if that allows the fewest; about two minutes on two cores
PASSES = 3  # that a step takes: forward, and two backward
NUMBERS = 2**24  # that all inputs together hold, at most
NOISES = 640  # of which a fifth is for decisions
FITTING = 10  # passes that fitting takes, roughly
SHORT = 8  # positions, below which an axis is one of channels
CONTRASTS = (-0.5, 0.5)  # powers of ten


def synthetic_dataset(
    model: ir.Model, macs: int, seed: int, threads: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Dataset | None:
    """Up to 256 unlabelled inputs, made from a normalised model alone; fewer for one of many MACs.

    None for a model that can't tell what its inputs were like: one without batch normalisation, or whose inputs aren't
    one float tensor with a dynamic batch. Raises `TrainingError` where the model has operators without a gradient, or
    the training runtime can't be had.
    """
    inputs = model_inputs(model)
    if len(inputs) != 1 or inputs[0].dtype != ir.DataType.FLOAT or fixed_batch(model) or not _norms(model):
        return None
    name = inputs[0].name or ""
    affordable = min(BUDGET / (PASSES * STEPS * max(macs, 1)), NUMBERS / random_inputs(model, seed, batch=1)[name].size)
    count = int(np.clip(affordable, FEWEST, MOST)) // SHARD * SHARD
    steps = int(np.clip(BUDGET / (PASSES * count * max(macs, 1)), LEAST_STEPS, STEPS))
    options = TrainingOptions(epochs=steps, lr=RATE, weight_decay=0.0, threads=threads, seed=seed)

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            progress(event["step"], event["total"])

    graph = _statistics_loss(model, random_inputs(model, seed, batch=count)[name])
    with tempfile.TemporaryDirectory() as folder:
        found = minimise(graph, [IMAGES], count, Path(folder) / "job", options, show)
    return Dataset({name: found[IMAGES]}, None)


def noise_dataset(model: ir.Model, macs: int, seed: int) -> Dataset | None:
    """Up to 640 unlabelled inputs of pink noise, for a normalised model that tells nothing of its inputs; fewer for one
    of many MACs. None for a model that reads anything but floats.

    Images and signals have the same energy in every octave (Field 1987, Relations between the statistics of natural
    images and the response properties of cortical cells), and channels that look alike: half of this noise is the same
    in all of them. On that comes a brightness of as much variance; contrasts of samples differ up to tenfold. All suits
    standardised data.
    """
    if any(value.dtype is None or not value.dtype.is_floating_point() for value in model_inputs(model)):
        return None
    sizes = [array.size / len(array) for array in random_dataset(model, 1, seed).inputs.values() if array.ndim]
    affordable = min(BUDGET / (FITTING * max(macs, 1)), NUMBERS / max(sum(sizes), 1))
    drawn, rng = random_dataset(model, int(np.clip(affordable, FEWEST, NOISES)), seed), np.random.default_rng(seed)
    return Dataset({name: _pink(array.shape, rng).astype(array.dtype) for name, array in drawn.inputs.items()}, None)


def _pink(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float64]:
    """Samples with the same energy in every octave along their long axes, each of its own contrast and brightness."""
    places = [axis for axis in range(1, len(shape)) if shape[axis] >= SHORT] if len(shape) > 2 else []
    squares, lowest = np.zeros((1,) * len(shape)), 1.0
    for axis in places:
        along = [-1 if other == axis else 1 for other in range(len(shape))]
        squares = squares + np.square(np.fft.fftfreq(shape[axis])).reshape(along)
        lowest = min(lowest, 1 / shape[axis])
    fall = np.maximum(np.sqrt(squares), lowest) ** (-len(places) / 2)

    def drawn(alike: bool) -> NDArray[np.float64]:
        size = [1 if alike and axis not in (0, *places) else shape[axis] for axis in range(len(shape))]
        white = rng.standard_normal(size)
        return np.asarray(np.fft.ifftn(np.fft.fftn(white, axes=places) * fall, axes=places).real if places else white)

    noise, each = drawn(False) + drawn(True), shape[:1] + (1,) * (len(shape) - 1)
    noise = noise / max(noise.std(), 1e-12) + rng.standard_normal(each)
    return np.asarray(noise * 10 ** rng.uniform(*CONTRASTS, each))


def _norms(model: ir.Model) -> list[ir.Node]:
    return [
        node
        for node in model.graph
        if node.op_type == "BatchNormalization" and all(v is not None and v.is_initializer() for v in node.inputs[1:5])
    ]


def _statistics_loss(model: ir.Model, noise: np.ndarray[Any, Any]) -> ir.Model:
    """A graph whose input chooses some of the inputs, which are an initializer, and whose output is their loss."""
    name = model.graph.inputs[0].name or ""
    graph, shapes = at_sizes(spell_out(model.clone()), {name: (SHARD, *noise.shape[1:])})
    terms = list[ir.Value]()
    for node in _norms(graph):
        terms += _fixed(graph, node, shapes)
    source = graph.graph.inputs[0]
    table = add_initializer(graph, IMAGES, noise.astype(np.float32))
    chosen = ir.Value(name="onnxprune.chosen", shape=ir.Shape([SHARD]), type=ir.TensorType(ir.DataType.INT64))
    gather = ir.node("Gather", [table, chosen], {"axis": 0}, name="onnxprune.gather")
    gather.outputs[0].name = gather.name
    graph.graph.insert_before(next(iter(graph.graph)), gather)
    source.replace_all_uses_with(gather.outputs[0])
    graph.graph.inputs.clear()
    graph.graph.inputs.append(chosen)
    total = terms[0]
    for number, term in enumerate(terms[1:]):
        node = ir.node("Add", [total, term], name=f"onnxprune.loss{number}")
        graph.graph.append(node)
        total = node.outputs[0]
        total.name = node.name
    total.type, total.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph.graph.outputs.clear()
    graph.graph.outputs.append(total)
    if blocked := behind(lower(graph, shapes), [IMAGES]):
        raise TrainingError(next(iter(blocked.values())))
    return graph


def _fixed(graph: ir.Model, node: ir.Node, shapes: Shapes) -> list[ir.Value]:
    """Replaces a batch normalisation by a scale and a shift; how far what it reads is from its statistics."""
    x = node.inputs[0]
    shape = shapes(x) if x is not None else None
    if x is None or shape is None:
        raise TrainingError(f"node {node.name!r}: the rank of what it normalises isn't known")
    gamma, beta, mean, variance = (np.asarray(constant(value), np.float64) for value in node.inputs[1:5])
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    deviation = np.sqrt(variance + epsilon)
    along = [1, -1, *[1] * (len(shape) - 2)]

    def array(kind: str, numbers: np.ndarray[Any, Any], dtype: Any = np.float32) -> ir.Value:
        return add_initializer(graph, f"{node.name}.{kind}", numbers.astype(dtype))

    def add(op: str, inputs: list[ir.Value], **attributes: int | list[int]) -> ir.Value:
        made = ir.node(op, inputs, attributes, name=f"{node.name}.{op}{sum(1 for _ in graph.graph)}")
        made.outputs[0].name = made.name
        graph.graph.insert_before(node, made)
        return made.outputs[0]

    def average(value: ir.Value) -> ir.Value:
        axes = [axis for axis in range(len(shape)) if axis != 1]
        if graph.opset_imports[""] < 18:
            return add("ReduceMean", [value], axes=axes, keepdims=1)
        return add("ReduceMean", [value, array("axes", np.array(axes), np.int64)], keepdims=1)

    one, tiny = array("one", np.ones(())), array("tiny", np.full((), 1e-6))
    centred = add("Sub", [x, array("mean", mean.reshape(along))])
    normal = add("Mul", [centred, array("inverse", (1 / deviation).reshape(along))])
    shift = average(normal)
    apart = add("Sub", [normal, shift])
    spread = add("Sqrt", [add("Add", [average(add("Mul", [apart, apart])), tiny])])
    wide = add("Sub", [spread, one])
    terms = [add("ReduceMean", [add("Mul", [term, term])], keepdims=0) for term in (shift, wide)]
    scaled = add("Mul", [normal, array("gamma", gamma.reshape(along))])
    replace_node(graph, node, ir.node("Add", [scaled, array("beta", beta.reshape(along))], name=node.name))
    return terms
