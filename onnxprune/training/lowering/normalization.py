"""Normalisation: outputs that gradients read, and forms made of means."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxprune.graph.model import constant
from onnxprune.labels.flow import integer, text
from onnxprune.training.lowering.base import Lowerer, attribute, first, lowering


@lowering("BatchNormalization")
def _batch_norm(lower: Lowerer, node: ir.Node) -> None:
    """Batch statistics, which its gradient needs as outputs; or a scale and a shift by the statistics it has."""
    if lower.batch_statistics and not lower.plain:
        node.attributes["training_mode"] = ir.AttrInt64("training_mode", 1)
        _name_outputs(node, "mean", "var")
        return
    x, gamma, beta, mean, variance = node.inputs
    assert x is not None and gamma is not None and beta is not None
    rank = len(lower.sizes(node, x))
    if lower.batch_statistics:
        _standardised(lower, node, (x, gamma, beta), [0, *range(2, rank)])
        return
    deviation = np.sqrt(_array(lower, node, variance) + attribute(node, "epsilon", 1e-5))
    scale = lower.add(node, "Div", [gamma, lower.constant(node, deviation.astype(np.float32))])
    moved = lower.add(node, "Mul", [scale, lower.constant(node, _array(lower, node, mean).astype(np.float32))])
    shift = lower.add(node, "Sub", [beta, moved])
    if (maker := x.producer()) is not None and maker.op_type == "Conv" and len(x.uses()) == 1:
        _scaled_convolution(lower, node, maker, scale, shift)
        return
    along = [1, -1] + [1] * (rank - 2)
    scaled = lower.add(node, "Mul", [x, lower.reshape(node, scale, *along)])
    lower.replace(node, "Add", [scaled, lower.reshape(node, shift, *along)])


def _scaled_convolution(lower: Lowerer, node: ir.Node, conv: ir.Node, scale: ir.Value, shift: ir.Value) -> None:
    """The convolution before it with scaled weights: no pass over what it makes, and the same gradients."""
    x, weight = conv.inputs[:2]
    assert x is not None and weight is not None
    along = [-1] + [1] * (len(lower.sizes(conv, weight)) - 1)
    scaled = lower.add(node, "Mul", [weight, lower.reshape(node, scale, *along)])
    if len(conv.inputs) > 2 and (bias := conv.inputs[2]) is not None:
        shift = lower.add(node, "Add", [shift, lower.add(node, "Mul", [bias, scale])])
    lower.replace(node, "Conv", [x, scaled, shift], **conv.attributes)  # type: ignore[arg-type]
    lower.model.graph.remove(conv, safe=True)


def _standardised(lower: Lowerer, node: ir.Node, inputs: tuple[ir.Value, ir.Value, ir.Value], axes: list[int]) -> None:
    """scale (x - mean) / sqrt(variance + epsilon) + bias, with the mean and the variance over these axes."""
    x, scale, bias = inputs
    along = [1, -1] + [1] * (len(lower.sizes(node, x)) - 2)
    apart = lower.add(node, "Sub", [x, lower.mean(node, x, axes)])
    variance = lower.mean(node, lower.add(node, "Mul", [apart, apart]), axes)
    epsilon = lower.number(node, attribute(node, "epsilon", 1e-5))
    deviation = lower.add(node, "Sqrt", [lower.add(node, "Add", [variance, epsilon])])
    normal = lower.add(node, "Div", [apart, deviation])
    scaled = lower.add(node, "Mul", [normal, lower.reshape(node, scale, *along)])
    lower.replace(node, "Add", [scaled, lower.reshape(node, bias, *along)])


def _array(lower: Lowerer, node: ir.Node, value: ir.Value | None) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    array = constant(value)
    if array is None:
        raise lower.refusal(node, "its statistics aren't constant")
    return np.asarray(array, np.float64)


@lowering("LayerNormalization")
def _layer_norm(lower: Lowerer, node: ir.Node) -> None:
    """Its gradient reads the outputs Mean and InvStdDev, and wants a bias."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        scale = node.inputs[1]
        assert scale is not None
        node.resize_inputs(3)
        node.replace_input_with(2, lower.constant(node, np.zeros(lower.sizes(node, scale), np.float32)))
    if not lower.plain:
        _name_outputs(node, "mean", "inverse_deviation")


@lowering("SimplifiedLayerNormalization")
def _simplified(lower: Lowerer, node: ir.Node) -> None:
    """Its gradient reads the output InvStdDev; or x / sqrt(mean of squares + epsilon), times the scale."""
    if not lower.plain:
        _name_outputs(node, "inverse_deviation")
        return
    x, scale = node.inputs[:2]
    assert x is not None and scale is not None
    rank = len(lower.sizes(node, x))
    axes = list(range(integer(node, "axis", -1) % rank, rank))
    square = lower.mean(node, lower.add(node, "Mul", [x, x]), axes)
    inner = lower.add(node, "Add", [square, lower.number(node, attribute(node, "epsilon", 1e-5))])
    lower.replace(node, "Mul", [lower.add(node, "Div", [x, lower.add(node, "Sqrt", [inner])]), scale])


@lowering("SoftmaxCrossEntropyLoss")
def _cross_entropy(lower: Lowerer, node: ir.Node) -> None:
    """Its gradient reads the output log_prob; whether one that isn't named is added depends on the build.

    With labels that don't count, class weights or another reduction it is spelt out: -log p times a mask.
    """
    plain = (
        len(node.inputs) == 2 and "ignore_index" not in node.attributes and text(node, "reduction", "mean") == "mean"
    )
    if not plain:
        _spelt_out_cross_entropy(lower, node)
    elif not lower.plain:
        _name_outputs(node, "log_prob")


def _spelt_out_cross_entropy(lower: Lowerer, node: ir.Node) -> None:
    """A mean is over what counts, by class weights; where nothing does it is 0, for the standard's 0 / 0."""
    scores, labels = node.inputs[:2]
    assert scores is not None and labels is not None
    if len(node.outputs) > 1 and list(node.outputs[1].uses()):
        raise lower.refusal(node, "its second output is used")
    shape = lower.sizes(node, scores)
    rank = len(shape)
    classes = np.arange(shape[1]).reshape(1, -1, *[1] * (rank - 2))
    ignored = integer(node, "ignore_index", -1)  # where none is, no class is -1
    classes = np.where(classes == ignored, -1 - abs(ignored), classes)
    wide = lower.add(node, "Unsqueeze", [labels, lower.integers(node, 1)])
    hot = lower.add(node, "Equal", [wide, lower.constant(node, classes.astype(_kind(lower, labels)))])
    mask = lower.add(node, "Cast", [hot], to=int(ir.DataType.FLOAT))
    if len(node.inputs) > 2 and (weights := node.inputs[2]) is not None:
        mask = lower.add(node, "Mul", [mask, lower.reshape(node, weights, 1, shape[1], *[1] * (rank - 2))])
    log_p = lower.add(node, "LogSoftmax", [scores], axis=1)
    axes = [1] if text(node, "reduction", "mean") == "none" else list(range(rank))
    loss = lower.add(
        node, "ReduceSum", [lower.add(node, "Mul", [log_p, mask]), lower.integers(node, *axes)], keepdims=0
    )
    if text(node, "reduction", "mean") == "mean":
        count = lower.add(node, "ReduceSum", [mask, lower.integers(node, *axes)], keepdims=0)
        loss = lower.add(node, "Div", [loss, lower.add(node, "Max", [count, lower.number(node, 1e-9)])])
    lower.replace(node, "Neg", [loss])


def _kind(lower: Lowerer, labels: ir.Value) -> np.dtype[np.generic]:
    kind = labels.dtype or lower.shapes.element_type(labels) or ir.DataType.INT64
    return kind.numpy()


def _name_outputs(node: ir.Node, *names: str) -> None:
    node.resize_outputs(1 + len(names))
    for value, name in zip(node.outputs[1:], names, strict=True):
        value.name = value.name or f"{node.name}.{name}"


@lowering("InstanceNormalization")
def _instance_norm(lower: Lowerer, node: ir.Node) -> None:
    """Over the positions of each sample and channel."""
    x, scale, bias = node.inputs
    assert x is not None and scale is not None and bias is not None
    _standardised(lower, node, (x, scale, bias), list(range(2, len(lower.sizes(node, x)))))


@lowering("LpNormalization")
def _unit_norm(lower: Lowerer, node: ir.Node) -> None:
    """x / |x| along an axis, with the norm's square root kept away from zero as in the operator's use."""
    x, axis = first(node), integer(node, "axis", -1)
    if integer(node, "p", 2) == 1:
        size = lower.sum(node, lower.add(node, "Abs", [x]), [axis])
    else:
        size = lower.add(node, "Sqrt", [lower.sum(node, lower.add(node, "Mul", [x, x]), [axis])])
    lower.replace(node, "Div", [x, size])


@lowering("LRN")
def _local_response(lower: Lowerer, node: ir.Node) -> None:
    """x / (bias + alpha / size · sum of squares over neighbouring channels) ^ beta."""
    x = first(node)
    shape, size = lower.sizes(node, x), integer(node, "size", 1)
    apart = np.arange(shape[1])[None, :] - np.arange(shape[1])[:, None]  # of channel c: c - floor((size - 1) / 2) …
    band = (apart >= -((size - 1) // 2)) & (apart <= math.ceil((size - 1) / 2))
    share = attribute(node, "alpha", 1e-4) / size
    sums = lower.along_axis(node, lower.add(node, "Mul", [x, x]), len(shape), 1, (band * share).astype(np.float32))
    inner = lower.add(node, "Add", [sums, lower.number(node, attribute(node, "bias", 1.0))])
    raised = lower.add(node, "Pow", [inner, lower.number(node, attribute(node, "beta", 0.75))])
    lower.replace(node, "Div", [x, raised])
