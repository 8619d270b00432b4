"""Calibration inputs for those who have no data: noise, changed until batch normalisation sees what it saw in training.

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

from onnxprune.data import Dataset, fixed_batch, model_inputs, random_inputs
from onnxprune.errors import TrainingError
from onnxprune.model import constant
from onnxprune.shapes import Shapes, add_initializer, replace_node
from onnxprune.training import TrainingOptions, minimise
from onnxprune.training.lowering import at_sizes, behind, lower, spell_out

IMAGES = "onnxprune.inputs"
MOST, FEWEST, SHARD = 256, 32, 32  # inputs; as many as a thread of the worker takes at a time
STEPS, LEAST_STEPS, RATE = 60, 20, 0.2
BUDGET = 4e12  # multiply-accumulates that all steps may take, if that allows the fewest; about two minutes on two cores
PASSES = 3  # that a step takes: forward, and two backward
NUMBERS = 2**24  # that all inputs together hold, at most


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
