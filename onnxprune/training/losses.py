"""The loss as ordinary nodes of the training graph, chosen from what the data and the model's outputs are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxprune.data import Dataset, class_axis
from onnxprune.errors import UsageError
from onnxprune.evaluate import all_shapes
from onnxprune.labels.flow import integer
from onnxprune.shapes import Shapes, add_initializer

LABELS = "onnxprune.labels"  # the name of their input
Kind = Literal["cross-entropy", "bce", "mse", "l1"]
KINDS: tuple[Kind, ...] = ("cross-entropy", "bce", "mse", "l1")
BEHIND = {"cross-entropy": ("Softmax", "LogSoftmax"), "bce": ("Sigmoid",)}  # what makes probabilities of the scores


@dataclass(frozen=True)
class Loss:
    """What is asked of the loss: `kind` None is chosen by the labels; `distillation` is the teacher's share of it.

    `smoothing` is the share of each label that is spread over all classes, `temperature` that of distillation.
    `features` weighs inner values against the teacher's, beside the rest, where there is distillation.
    """

    kind: Kind | None = None
    distillation: float = 0.5
    temperature: float = 2.0
    smoothing: float = 0.0
    features: float = 1.0


@dataclass(frozen=True)
class LossPlan:
    """What is minimised: a loss on labels, if there are any, and a distillation loss from the uncut model.

    `values` are the values compared with the teacher (scores before a final Softmax or Sigmoid, or the outputs);
    classes lie along `axis` of them. `features` are inner values that are compared as well, each weighed by `weight`.
    """

    labels: Kind | None
    distillation: Literal["kl", "mse"]
    share: float  # of the distillation loss, in [0, 1]
    values: tuple[str, ...]
    axis: int = -1
    temperature: float = 2.0
    smoothing: float = 0.0
    features: tuple[str, ...] = ()
    weight: float = 0.0

    @property
    def compared(self) -> tuple[str, ...]:
        """All that the teacher is asked for, in order."""
        return (*self.values, *self.features)


def plan_loss(model: ir.Model, data: Dataset, asked: Loss | None = None) -> LossPlan:
    """The loss for a model and data: labels and distillation, or distillation alone without labels.

    Raises `UsageError` for a kind that the labels don't fit.
    """
    asked = asked or Loss()
    outputs = [value for value in model.graph.outputs if value.dtype is None or value.dtype.is_floating_point()]
    scores = [scores_behind(value, BEHIND["cross-entropy"]) for value in outputs]
    plan = partial(LossPlan, temperature=asked.temperature, smoothing=asked.smoothing)
    if data.labels is None:
        if asked.kind is not None:
            raise UsageError(f"--loss {asked.kind} needs labels, which the data lacks")
        kind: Literal["kl", "mse"] = "kl" if len(outputs) == 1 and scores[0] is not outputs[0] else "mse"
        names = tuple(v.name or "" for v in (scores if kind == "kl" else outputs))
        return plan(None, kind, 1.0, names, _class_axis(outputs[0], None))
    float_labels = data.labels.dtype.kind == "f"
    labels: Kind = asked.kind or ("mse" if float_labels else "cross-entropy")
    if (labels == "cross-entropy") == float_labels:
        raise UsageError(f"--loss {labels} doesn't fit labels of type {data.labels.dtype}")
    compared = scores_behind(outputs[0], BEHIND.get(labels, ()))
    axis = _class_axis(outputs[0], data.labels.shape) if labels == "cross-entropy" else -1
    distillation: Literal["kl", "mse"] = "kl" if labels == "cross-entropy" else "mse"
    return plan(labels, distillation, asked.distillation, (compared.name or "",), axis)


def _class_axis(output: ir.Value, labels_shape: Sequence[int] | None) -> int:
    """The axis of class scores: that of a final Softmax, or as the labels have it, or the last."""
    node = output.producer()
    if node is not None and node.op_type in BEHIND["cross-entropy"]:
        return integer(node, "axis", -1)
    return class_axis(list(output.shape or ()), labels_shape or ())


def whole_features(model: ir.Model, teacher: ir.Model, loss: LossPlan) -> tuple[str, ...]:
    """Inner values of a cut model that can be held against the teacher's: the last of each size along its trunk.

    On the trunk lie values that everything behind them hangs on alone; what was cut there has another shape and is left
    out. Comparing them gives each stage a target of its own (Romero et al. 2015, FitNets, section 2.2).
    """
    shapes, wholes = all_shapes(model), all_shapes(teacher)
    there = {value.name: value for node in teacher.graph for value in node.outputs}
    found: dict[tuple[int | None, ...], str] = {}
    for value in _trunk(model, shapes):
        shape, same = shapes(value), there.get(value.name)
        if shape is None or len(shape) < 3 or same is None or value.name in loss.values or value.is_graph_output():
            continue
        if wholes(same) == shape:
            found[shape[1:]] = value.name or ""
    return tuple(found.values())


def _trunk(model: ir.Model, shapes: Shapes) -> Iterator[ir.Value]:
    """Floating-point values that nothing made before them is used after, in order."""
    nodes = list(model.graph)
    ends = {value: index for index, node in enumerate(nodes) for value in node.inputs if value is not None}
    alive = {value for value in model.graph.inputs if value in ends}
    for index, node in enumerate(nodes):
        for value in node.outputs:
            kind = shapes.element_type(value)
            if value in ends and (kind is None or kind.is_floating_point()):
                alive.add(value)
        alive = {value for value in alive if ends[value] > index}
        if len(alive) == 1 and (last := next(iter(alive))).producer() is node:
            yield last


def scores_behind(output: ir.Value, functions: Sequence[str]) -> ir.Value:
    """What a final Softmax, or another of these functions, is given; else the output itself."""
    node = output.producer()
    if node is not None and node.op_type in functions and node.inputs[0] is not None:
        return node.inputs[0]
    return output


def add_loss(model: ir.Model, plan: LossPlan, labels_shape: Sequence[int] | None) -> None:
    """Replaces the outputs of a model by the scalar `loss`, followed by what is compared with the teacher.

    New inputs: `onnxprune.labels` (int64 or float32), and `onnxprune.teacher.I` for every compared value.
    """
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    students = [values[name] for name in plan.values]
    terms: list[tuple[float, ir.Value]] = []
    if plan.labels is not None:
        dtype = ir.DataType.INT64 if plan.labels == "cross-entropy" else ir.DataType.FLOAT
        labels = _input(model, LABELS, dtype, labels_shape or ())
        terms.append((1 - plan.share, LOSSES[plan.labels](model, students[0], labels, plan)))
    if plan.share > 0:
        for index, student in enumerate(students):
            shape = student.shape.numpy() if student.shape is not None else ()
            teacher = _input(model, f"onnxprune.teacher.{index}", ir.DataType.FLOAT, shape)
            part = (
                _kl(model, student, teacher, plan) if plan.distillation == "kl" else _relative(model, student, teacher)
            )
            terms.append((plan.share / len(students), part))
    for index, name in enumerate(plan.features, len(students)):
        inner = values[name]
        teacher = _input(model, f"onnxprune.teacher.{index}", ir.DataType.FLOAT, inner.shape.numpy())  # type: ignore[union-attr]
        terms.append((plan.weight, _relative(model, inner, teacher)))
    total: ir.Value | None = None
    for weight, term in terms:
        scaled = _node(model, "Mul", [term, _constant(model, weight)])
        total = scaled if total is None else _node(model, "Add", [total, scaled])
    assert total is not None
    loss = _node(model, "Identity", [total])
    loss.name, loss.type, loss.shape = "onnxprune.loss", ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph.outputs.clear()
    graph.outputs.append(loss)
    graph.outputs.extend(students)


def _cross_entropy(model: ir.Model, scores: ir.Value, labels: ir.Value, plan: LossPlan) -> ir.Value:
    """Of class indices; the smoothed part is the mean of -log p over all classes (Szegedy et al. 2016, section 7)."""
    rank = len(scores.shape or ())
    axis = plan.axis % rank
    if axis != 1:  # the loss wants (N, C, ...)
        scores = _node(model, "Transpose", [scores], {"perm": [0, axis, *(i for i in range(1, rank) if i != axis)]})
    loss = _node(model, "SoftmaxCrossEntropyLoss", [scores, labels])
    if not plan.smoothing:
        return loss
    spread = _node(model, "Neg", [_mean(model, _node(model, "LogSoftmax", [scores], {"axis": 1}))])
    parts = zip((loss, spread), (1 - plan.smoothing, plan.smoothing), strict=True)
    return _node(model, "Add", [_node(model, "Mul", [part, _constant(model, share)]) for part, share in parts])


def _binary(model: ir.Model, scores: ir.Value, labels: ir.Value, plan: LossPlan) -> ir.Value:
    """Binary cross-entropy of scores before a sigmoid: max(x, 0) - x y + log(1 + exp(-|x|)), which never overflows."""
    small = _node(model, "Exp", [_node(model, "Neg", [_node(model, "Abs", [scores])])])
    rest = _node(model, "Log", [_node(model, "Add", [small, _constant(model, 1.0)])])
    linear = _node(model, "Sub", [_node(model, "Relu", [scores]), _node(model, "Mul", [scores, labels])])
    return _mean(model, _node(model, "Add", [linear, rest]))


def _absolute(model: ir.Model, found: ir.Value, labels: ir.Value, plan: LossPlan) -> ir.Value:
    return _mean(model, _node(model, "Abs", [_node(model, "Sub", [found, labels])]))


def _square(model: ir.Model, found: ir.Value, labels: ir.Value, plan: LossPlan) -> ir.Value:
    return _mean_square(model, found, labels)


LOSSES = {"cross-entropy": _cross_entropy, "bce": _binary, "mse": _square, "l1": _absolute}


def _kl(model: ir.Model, student: ir.Value, teacher: ir.Value, plan: LossPlan) -> ir.Value:
    """T^2 KL(teacher || student) at temperature T, mean over positions (Hinton et al. 2015, section 2)."""
    axis = plan.axis
    t = _constant(model, plan.temperature)
    log_q = _node(model, "LogSoftmax", [_node(model, "Div", [student, t])], {"axis": axis})
    cooled = _node(model, "Div", [teacher, t])
    p, log_p = (_node(model, op, [cooled], {"axis": axis}) for op in ("Softmax", "LogSoftmax"))
    products = _node(model, "Mul", [p, _node(model, "Sub", [log_p, log_q])])
    axes = add_initializer(model, "onnxprune.kl.axes", np.array([axis], np.int64))
    mean = _mean(model, _node(model, "ReduceSum", [products, axes], {"keepdims": 0}))
    return _node(model, "Mul", [mean, _constant(model, plan.temperature**2)])


def _relative(model: ir.Model, student: ir.Value, teacher: ir.Value) -> ir.Value:
    """Mean square error over the mean square of the teacher, so that its size doesn't depend on the output's unit."""
    scale = _node(model, "Add", [_mean(model, _node(model, "Mul", [teacher, teacher])), _constant(model, 1e-6)])
    return _node(model, "Div", [_mean_square(model, student, teacher), scale])


def _mean_square(model: ir.Model, a: ir.Value, b: ir.Value) -> ir.Value:
    difference = _node(model, "Sub", [a, b])
    return _mean(model, _node(model, "Mul", [difference, difference]))


def _mean(model: ir.Model, value: ir.Value) -> ir.Value:
    return _node(model, "ReduceMean", [value], {"keepdims": 0})


def _constant(model: ir.Model, number: float) -> ir.Value:
    return add_initializer(model, "onnxprune.loss.constant", np.array(number, np.float32))


def _input(model: ir.Model, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    model.graph.inputs.append(value)
    return value


def _node(
    model: ir.Model, op: str, inputs: list[ir.Value], attributes: dict[str, int | list[int]] | None = None
) -> ir.Value:
    node = ir.node(op, inputs, attributes or {})
    model.graph.append(node)
    node.outputs[0].name = f"onnxprune.loss.{sum(1 for _ in model.graph)}"
    node.name = node.outputs[0].name
    return node.outputs[0]
