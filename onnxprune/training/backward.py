"""Gradients as plain ONNX nodes, by onnxsim's differentiation: they run wherever onnxruntime does.

onnxsim has rules for 46 operators; those that it lacks and that trained graphs are made of are added here, and that of
Conv is replaced: as two convolutions it needs no tables of indices.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, inliner, numpy_helper

from onnxprune.errors import TrainingError
from onnxprune.evaluating.evaluate import all_shapes
from onnxprune.graph.shapes import SMALL
from onnxprune.training.lowering import FLAT

Rule = Callable[[Any, onnx.NodeProto, str], list[str | None]]
RULES: dict[str, Rule] = {}


def gradient_model(
    graph: ir.Model, names: list[str], gpu: bool = False
) -> tuple[onnx.ModelProto, list[str], dict[str, str]]:
    """A lowered training graph with the gradients of its first output as further outputs.

    Returns it with the parameters `names` as inputs, its first outputs, and each parameter's output. Parameters that
    the loss doesn't hang on have none. For a `gpu` fewer and larger operators are taken. Raises `TrainingError` naming
    the operator that has no gradient.
    """
    from onnxsim import graph_grad, qat_graph  # takes a second to load

    proto = ir.to_proto(graph)
    shapes = _shapes(graph)
    nodes = _between(proto.graph, names)
    builder = qat_graph.GraphBuilder("onnxprune.backward.")
    builder.initializer.extend(t for t in proto.graph.initializer if t.name not in names and _small(t))
    known = len(builder.initializer)
    loss = proto.graph.output[0].name
    one = builder.const(np.array(1, np.float32))
    reached = [name for name in names if any(name in node.input for node in nodes)]
    try:
        with contextlib.ExitStack() as stack:
            for operator, each in {**RULES, **(ON_GPU if gpu else {})}.items():
                stack.enter_context(graph_grad.custom_gradient(operator, each, override=True))
            found = graph_grad.build_backward(builder, nodes, shapes, {loss: one}, reached)
    except (ValueError, NotImplementedError) as error:
        reason = str(error).split("; onnxsim")[0].split(" -- ")[0]
        raise TrainingError(f"the graph trainer can't differentiate this model: {reason}; use --epochs 0") from error
    for node in builder.nodes if graph.opset_imports[""] >= 18 else ():
        _axes_as_input(node, builder)
    proto.graph.node.extend(builder.nodes)
    proto.graph.initializer.extend(builder.initializer[known:])
    heads = [value.name for value in proto.graph.output]
    gradients = {name: f"onnxprune.gradient.{index}" for index, name in enumerate(found)}
    for name, value in found.items():
        proto.graph.node.append(helper.make_node("Identity", [value], [gradients[name]]))
        proto.graph.output.append(helper.make_tensor_value_info(gradients[name], TensorProto.FLOAT, shapes[name]))
    for tensor in [tensor for tensor in proto.graph.initializer if tensor.name in names]:
        proto.graph.initializer.remove(tensor)
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    proto.functions.extend(builder.functions)
    proto.opset_import.extend(helper.make_opsetid(domain, 1) for domain in {f.domain for f in builder.functions})
    return inliner.inline_local_functions(proto), heads, gradients


def differentiable() -> set[str]:
    """The operators that have a gradient here."""
    from onnxsim.graph_grad import supported_ops

    return {*supported_ops(), *RULES}


def _small(tensor: onnx.TensorProto) -> bool:
    return bool(np.prod(tensor.dims) <= SMALL)


def _shapes(graph: ir.Model) -> dict[str, Sequence[int | str]]:
    shapes = all_shapes(graph)
    values = [*graph.graph.inputs, *graph.graph.initializers.values(), *(v for n in graph.graph for v in n.outputs)]
    found = {value.name or "": shapes.concrete(value) for value in values}
    return {name: list(shape) for name, shape in found.items() if shape is not None}


def _between(graph: onnx.GraphProto, names: list[str]) -> list[onnx.NodeProto]:
    """The nodes that hang on parameters, and that the loss hangs on."""
    wanted, behind = {graph.output[0].name}, list[onnx.NodeProto]()
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input)
            behind.append(node)
    changing, found = set(names), list[onnx.NodeProto]()
    for node in reversed(behind):
        if changing.intersection(node.input) and node.op_type not in FLAT:
            changing.update(node.output)
            found.append(node)
    return found


def _axes_as_input(node: onnx.NodeProto, builder: Any) -> None:
    """ReduceMean takes its axes as an input from opset 18 on; onnxsim writes opset 17."""
    axes = next((a for a in node.attribute if a.name == "axes"), None)
    if node.op_type == "ReduceMean" and axes is not None:
        name = builder.name("axes")
        builder.initializer.append(numpy_helper.from_array(np.array(axes.ints, np.int64), name))
        node.attribute.remove(axes)
        node.input.append(name)


# ---- rules: (context, node, gradient of the output) -> gradient of each input


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Registers the gradient of operators."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


@rule("Abs")
def _abs(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    return [ctx.b.mul(g, ctx.b.op("Sign", [node.input[0]]))]


@rule("Flatten")
def _flatten(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    return [ctx.b.op("Reshape", [g, ctx.int64_const(ctx.shape(node.input[0]))])]


@rule("Cast")
def _cast(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    return [g if _attribute(node, "to", 0) == TensorProto.FLOAT else None]


@rule("Pow")
def _pow(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    x, exponent = node.input
    raised = ctx.b.op("Pow", [x, ctx.b.sub(exponent, ctx.b.const(1.0))])
    slope = ctx.b.mul(g, ctx.b.mul(exponent, raised))
    return [ctx.reduce_to(slope, ctx.shape(node.output[0]), ctx.shape(x)), None]


@rule("Reciprocal")
def _reciprocal(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    return [ctx.b.op("Neg", [ctx.b.mul(g, ctx.b.mul(node.output[0], node.output[0]))])]


@rule("Sin", "Cos")
def _circular(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    other = ctx.b.op("Cos" if node.op_type == "Sin" else "Sin", [node.input[0]])
    return [ctx.b.mul(g, other if node.op_type == "Sin" else ctx.b.op("Neg", [other]))]


@rule("Gelu")
def _gelu(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    """Phi(x) + x phi(x), exact, or that of the approximation by tanh."""
    x, b = node.input[0], ctx.b
    if _attribute(node, "approximate", b"none") == b"tanh":
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        square = b.mul(x, x)
        inner = b.mul(b.const(scale), b.mul(x, b.add(b.const(1.0), b.mul(b.const(cubic), square))))
        t = b.op("Tanh", [inner])
        slope = b.mul(b.const(scale), b.add(b.const(1.0), b.mul(b.const(3 * cubic), square)))
        bent = b.mul(b.mul(x, b.sub(b.const(1.0), b.mul(t, t))), slope)
        return [b.mul(g, b.mul(b.const(0.5), b.add(b.add(b.const(1.0), t), bent)))]
    below = b.mul(b.const(0.5), b.add(b.const(1.0), b.op("Erf", [b.mul(x, b.const(math.sqrt(0.5)))])))
    density = b.mul(b.const(1 / math.sqrt(2 * math.pi)), b.op("Exp", [b.mul(b.const(-0.5), b.mul(x, x))]))
    return [b.mul(g, b.add(below, b.mul(x, density)))]


@rule("LogSoftmax")
def _log_softmax(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    axis = _attribute(node, "axis", -1)
    total = ctx.b.op("ReduceSum", [g, ctx.int64_const([axis])], keepdims=1)
    return [ctx.b.sub(g, ctx.b.mul(ctx.b.op("Exp", [node.output[0]]), total))]


@rule("SoftmaxCrossEntropyLoss")
def _cross_entropy(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    """(softmax - one hot) over the number of labels; classes lie along axis 1."""
    scores, labels = node.input[:2]
    shape = ctx.shape(scores)
    values = ctx.b.name("values")
    ctx.b.initializer.append(numpy_helper.from_array(np.array([0, 1], np.float32), values))
    hot = ctx.b.op("OneHot", [labels, ctx.int64_const([shape[1]]), values], axis=1)
    apart = ctx.b.sub(ctx.b.op("Softmax", [scores], axis=1), hot)
    share = ctx.b.mul(g, ctx.b.const(1 / (math.prod(shape) // shape[1])))
    return [ctx.b.mul(apart, share), *[None] * (len(node.input) - 1)]


@rule("Max", "Min")
def _extreme(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    """To the first where both are equal."""
    a, b = node.input
    first = ctx.b.op("GreaterOrEqual" if node.op_type == "Max" else "LessOrEqual", [a, b])
    mask = ctx.b.op("Cast", [first], to=TensorProto.FLOAT)
    parts = (ctx.b.mul(g, mask), ctx.b.mul(g, ctx.b.sub(ctx.b.const(1.0), mask)))
    shape = ctx.shape(node.output[0])
    return [ctx.reduce_to(part, shape, ctx.shape(name)) for part, name in zip(parts, (a, b), strict=True)]


@rule("ReduceL2")
def _norm(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    """x / |x|; of reductions that keep their axes."""
    if not _attribute(node, "keepdims", 1):
        raise NotImplementedError("ReduceL2 without keepdims")
    x = node.input[0]
    return [ctx.b.mul(g, ctx.b.div(x, node.output[0])), *[None] * (len(node.input) - 1)]


@rule("Gather")
def _gather(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    """Added up at the places that were read; onnxsim's rule knows vectors of indices only."""
    shape, rank = ctx.shape(node.input[0]), len(ctx.shape(node.input[1]))
    axis = _attribute(node, "axis", 0) % len(shape)
    others = [size for index, size in enumerate(shape) if index != axis]
    front = [*range(axis, axis + rank), *range(axis), *range(axis + rank, len(shape) - 1 + rank)]
    zeros = ctx.b.op("ConstantOfShape", [ctx.int64_const([shape[axis], *others])])
    places = ctx.b.op("Unsqueeze", [node.input[1], ctx.int64_const([-1])])
    places = ctx.b.op("Cast", [places], to=TensorProto.INT64)
    total = ctx.b.op("ScatterND", [zeros, places, ctx.b.op("Transpose", [g], perm=front)], reduction="add")
    back = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
    return [ctx.b.op("Transpose", [total], perm=back), None]


@rule("Trilu")
def _triangle(ctx: Any, node: onnx.NodeProto, g: str) -> list[str | None]:
    inputs = [g, *node.input[1:]]
    return [ctx.b.op("Trilu", inputs, upper=_attribute(node, "upper", 1)), *[None] * (len(node.input) - 1)]


def _conv(ctx: Any, node: onnx.NodeProto, g: str, together: bool) -> list[str | None]:
    """The input's as a transposed convolution, the weight's as products, tap by tap or with all of them `together`."""
    x, w = node.input[:2]
    x_shape, kernel, y_shape = ctx.shape(x), ctx.shape(w)[2:], ctx.shape(node.output[0])
    space, group = len(kernel), _attribute(node, "group", 1)
    strides, dilations = (_attribute(node, name, [1] * space) for name in ("strides", "dilations"))
    reach = [strides[i] * (y_shape[2 + i] - 1) + dilations[i] * (kernel[i] - 1) + 1 for i in range(space)]
    begins = _begins(node, [r - x for r, x in zip(reach, x_shape[2:], strict=True)])
    ends = [reach[i] - begins[i] - x_shape[2 + i] for i in range(space)]  # negative where rows are left over
    pads, over = [*begins, *(max(end, 0) for end in ends)], [max(-end, 0) for end in ends]
    dx = ctx.b.op(
        "ConvTranspose", [g, w], kernel_shape=kernel, strides=strides, dilations=dilations, pads=pads, group=group,
        output_padding=over,
    )  # fmt: skip
    dw = _weight_gradient(ctx, x, g, ctx.shape(w), y_shape, group, (strides, dilations, pads), together)
    if len(node.input) < 3:
        return [dx, dw]
    return [dx, dw, ctx.b.op("ReduceSum", [g, ctx.int64_const([0, *range(2, 2 + space)])], keepdims=0)]


def _weight_gradient(
    ctx: Any,
    x: str,
    g: str,
    shape: Sequence[int],
    y_shape: Sequence[int],
    group: int,
    window: tuple[list[int], ...],
    together: bool,
) -> str:
    """The product of the gradient with what each tap of the kernel read, over samples and positions."""
    (strides, dilations, pads), kernel, space = window, shape[2:], len(shape) - 2
    n, m, c, positions = y_shape[0], shape[0], shape[1], math.prod(y_shape[2:])
    if any(pads):
        zero = ctx.b.const(0.0)
        x = ctx.b.op("Pad", [x, ctx.int64_const([0, 0, *pads[:space], 0, 0, *pads[space:]]), zero])
    rows = ctx.b.op("Reshape", [g, ctx.int64_const([n, group, m // group, positions])])
    axes, steps, taps = ctx.int64_const(range(2, 2 + space)), ctx.int64_const(strides), []
    for tap in np.ndindex(*kernel):
        starts = [t * d for t, d in zip(tap, dilations, strict=True)]
        ends = [start + s * (size - 1) + 1 for start, s, size in zip(starts, strides, y_shape[2:], strict=True)]
        taps.append(ctx.b.op("Slice", [x, ctx.int64_const(starts), ctx.int64_const(ends), axes, steps]))

    def products(read: str, count: int) -> str:
        columns = ctx.b.op("Reshape", [read, ctx.int64_const([n, group, c * count, positions])])
        product = ctx.b.matmul(rows, ctx.b.transpose(columns, [0, 1, 3, 2]))
        return str(ctx.b.op("ReduceSum", [product, ctx.int64_const([0])], keepdims=0))

    if together or len(taps) == 1:
        found = products(ctx.b.op("Concat", taps, axis=2) if len(taps) > 1 else taps[0], len(taps))
    else:
        each = [ctx.b.op("Reshape", [products(tap, 1), ctx.int64_const([m, c, 1])]) for tap in taps]
        found = ctx.b.op("Concat", each, axis=2)
    return str(ctx.b.op("Reshape", [found, ctx.int64_const(shape)]))


def _begins(node: onnx.NodeProto, totals: list[int]) -> list[int]:
    """The padding in front of each axis; `totals` are what the window reaches beyond the input."""
    kind = _attribute(node, "auto_pad", b"NOTSET")
    if kind in (b"NOTSET", b""):
        return list(_attribute(node, "pads", [0] * 2 * len(totals))[: len(totals)])
    if kind == b"VALID":
        return [0] * len(totals)
    totals = [max(total, 0) for total in totals]
    return [total // 2 if kind == b"SAME_UPPER" else total - total // 2 for total in totals]


RULES["Conv"] = partial(_conv, together=False)
ON_GPU: dict[str, Rule] = {"Conv": partial(_conv, together=True)}  # launching one costs more than what it computes
