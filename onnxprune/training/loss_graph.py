"""The loss as ordinary nodes of the training graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce

import numpy as np
import onnx_ir as ir

from onnxprune.evaluating.data import IGNORED
from onnxprune.graph.shapes import add_initializer
from onnxprune.training.losses import LabelLoss, LossPlan, input_name
from onnxprune.training.own_loss import graft

Attributes = dict[str, int | list[int]]

MIXED = "onnxprune.mixed"  # the share of each sample in its mixture
OTHER = ".other"  # behind the name of labels: those of what it is mixed with
OWN = "onnxprune.own"


def add_own_loss(model: ir.Model, plan: LossPlan, sizes: Mapping[str, Sequence[int]]) -> None:
    """Puts the user's own loss behind a model of known sizes, as a further output; for mixtures, one for each label."""
    own, outputs = plan.own, {value.name: value for value in model.graph.outputs}
    assert own is not None

    def given(name: str, other: str) -> ir.Value:
        if name in own.outputs:
            return outputs[name]
        if name in own.labels:
            key, kind = own.labels[name]
            return _input(model, input_name(key) + other, kind, sizes[input_name(key)])
        at = plan.compared.index(own.teachers[name], len(plan.values) + len(plan.features))
        return _teacher(model, at, _shape(outputs[own.teachers[name]]))

    for other in ["", OTHER][: 1 + bool(plan.mix)]:
        loss = graft(model, own, partial(given, other=other), OWN + other)
        loss.name = OWN + other
        model.graph.outputs.append(loss)


def add_loss(model: ir.Model, plan: LossPlan, sizes: Mapping[str, Sequence[int]]) -> None:
    """Replaces the outputs of a model by the scalar `loss`, followed by what is compared with the teacher.

    `sizes` are the shapes of inputs. New inputs: `onnxprune.labels` (int64 or float32) and those of further outputs,
    `onnxprune.teacher.I` for every compared value, and where samples are mixed, the share of each, and the labels of
    what it is mixed with.
    """
    graph = model.graph
    values = {value.name: value for node in graph for value in node.outputs}
    students = [values[name] for name in plan.values]
    terms: list[tuple[float, ir.Value]] = []
    for loss in plan.labels:
        dtype = ir.DataType.INT64 if loss.kind == "cross-entropy" else ir.DataType.FLOAT
        names = [loss.labels + other for other in ("", OTHER)[: 1 + bool(plan.mix)]]
        labels = [_input(model, name, dtype, sizes[loss.labels]) for name in names]
        both = [LOSSES[loss.kind](model, values[loss.value], each, loss, plan.smoothing) for each in labels]
        terms.append(((1 - plan.share) * loss.weight, _mixed(model, both, sizes)))
    if plan.own is not None:
        both = [value for value in graph.outputs if (value.name or "").startswith(OWN)]
        terms.append((1 - plan.share, _mixed(model, both, sizes)))
    whole = sum(distance.weight for distance in plan.distances)
    for index, (distance, student) in enumerate(zip(plan.distances, students, strict=True)):
        if plan.share > 0 and distance.weight > 0:
            teacher = _teacher(model, index, _shape(student))
            counted = plan.share * distance.weight / whole / (distance.unit or 1.0)
            if distance.kind == "mse" and distance.unit is not None:
                term = _mean_square(model, student, teacher)
            else:
                term = DISTANCES[distance.kind](model, student, teacher, distance.axis, plan.temperature)
            terms.append((counted, term))
    for index, name in enumerate(plan.features, len(students)):
        teacher = _teacher(model, index, _shape(values[name]))
        terms.append((plan.weight, _relative(model, values[name], teacher)))
    parts = [_node(model, "Mul", [term, _constant(model, weight)]) for weight, term in terms]
    total = _node(model, "Identity", [reduce(lambda a, b: _node(model, "Add", [a, b]), parts)])
    total.name, total.type, total.shape = "onnxprune.loss", ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph.outputs.clear()
    graph.outputs.append(total)
    graph.outputs.extend(students)


def _mixed(model: ir.Model, losses: Sequence[ir.Value], sizes: Mapping[str, Sequence[int]]) -> ir.Value:
    """A loss; or those on both labels of mixtures, by their shares, which are the same in a whole batch."""
    if len(losses) == 1:
        return losses[0]
    share = _mean(model, _input(model, MIXED, ir.DataType.FLOAT, next(iter(sizes.values()))[:1]))
    rest = _node(model, "Sub", [_constant(model, 1.0), share])
    parts = [_node(model, "Mul", [loss, part]) for loss, part in zip(losses, (share, rest), strict=True)]
    return _node(model, "Add", parts)


def _cross_entropy(model: ir.Model, scores: ir.Value, labels: ir.Value, loss: LabelLoss, smoothing: float) -> ir.Value:
    """Of class indices; the smoothed part is the mean of -log p over all classes (Szegedy et al. 2016, section 7)."""
    rank = len(scores.shape or ())
    axis = loss.axis % rank
    if axis != 1:  # the loss wants (N, C, ...)
        order = [0, axis, *(i for i in range(1, rank) if i != axis)]
        shape = _shape(scores)
        scores = _node(model, "Transpose", [scores], {"perm": order})
        scores.shape = ir.Shape([shape[i] for i in order])
    attributes: Attributes = {"ignore_index": IGNORED} if loss.sparse else {}
    chosen = _node(model, "SoftmaxCrossEntropyLoss", [scores, labels], attributes)
    if not smoothing:
        return chosen
    log_p = _node(model, "LogSoftmax", [scores], {"axis": 1})
    if loss.sparse:
        counted = _node(model, "Not", [_node(model, "Equal", [labels, _integers(model, IGNORED)])])
        counted = _node(model, "Cast", [counted], {"to": int(ir.DataType.FLOAT)})
        masked = _node(model, "Mul", [log_p, _node(model, "Unsqueeze", [counted, _integers(model, 1)])])
        share = _node(model, "Max", [_mean(model, counted), _constant(model, 1e-9)])
        spread = _node(model, "Neg", [_node(model, "Div", [_mean(model, masked), share])])
    else:
        spread = _node(model, "Neg", [_mean(model, log_p)])
    parts = zip((chosen, spread), (1 - smoothing, smoothing), strict=True)
    return _node(model, "Add", [_node(model, "Mul", [part, _constant(model, share)]) for part, share in parts])


def _binary(model: ir.Model, scores: ir.Value, labels: ir.Value, loss: LabelLoss, smoothing: float) -> ir.Value:
    """Binary cross-entropy of scores before a sigmoid: max(x, 0) - x y + log(1 + exp(-|x|)), which never overflows."""
    small = _node(model, "Exp", [_node(model, "Neg", [_node(model, "Abs", [scores])])])
    rest = _node(model, "Log", [_node(model, "Add", [small, _constant(model, 1.0)])])
    linear = _node(model, "Sub", [_node(model, "Relu", [scores]), _node(model, "Mul", [scores, labels])])
    return _mean(model, _node(model, "Add", [linear, rest]))


def _absolute(model: ir.Model, found: ir.Value, labels: ir.Value, loss: LabelLoss, smoothing: float) -> ir.Value:
    return _mean(model, _node(model, "Abs", [_node(model, "Sub", [found, labels])]))


def _square(model: ir.Model, found: ir.Value, labels: ir.Value, loss: LabelLoss, smoothing: float) -> ir.Value:
    return _mean_square(model, found, labels)


LOSSES = {"cross-entropy": _cross_entropy, "bce": _binary, "mse": _square, "l1": _absolute}


def _kl(model: ir.Model, student: ir.Value, teacher: ir.Value, axis: int, temperature: float) -> ir.Value:
    """T^2 KL(teacher || student) at temperature T, mean over positions (Hinton et al. 2015, section 2)."""
    t = _constant(model, temperature)
    log_q = _node(model, "LogSoftmax", [_node(model, "Div", [student, t])], {"axis": axis})
    cooled = _node(model, "Div", [teacher, t])
    p, log_p = (_node(model, op, [cooled], {"axis": axis}) for op in ("Softmax", "LogSoftmax"))
    products = _node(model, "Mul", [p, _node(model, "Sub", [log_p, log_q])])
    mean = _mean(model, _node(model, "ReduceSum", [products, _integers(model, axis)], {"keepdims": 0}))
    return _node(model, "Mul", [mean, _constant(model, temperature**2)])


def _relative(model: ir.Model, student: ir.Value, teacher: ir.Value) -> ir.Value:
    """Mean square error over the mean square of the teacher, so that its size doesn't depend on the output's unit."""
    scale = _node(model, "Add", [_mean(model, _node(model, "Mul", [teacher, teacher])), _constant(model, 1e-6)])
    return _node(model, "Div", [_mean_square(model, student, teacher), scale])


def _angle(model: ir.Model, student: ir.Value, teacher: ir.Value) -> ir.Value:
    """One minus the cosine between each sample's values, mean over samples."""
    rest = _integers(model, *range(1, len(student.shape or ())))

    def dot(a: ir.Value, b: ir.Value) -> ir.Value:
        return _node(model, "ReduceSum", [_node(model, "Mul", [a, b]), rest], {"keepdims": 0})

    squares = _node(model, "Mul", [dot(student, student), dot(teacher, teacher)])
    norms = _node(model, "Sqrt", [_node(model, "Add", [squares, _constant(model, 1e-12)])])
    return _node(
        model, "Sub", [_constant(model, 1.0), _mean(model, _node(model, "Div", [dot(student, teacher), norms]))]
    )


DISTANCES: dict[str, Callable[[ir.Model, ir.Value, ir.Value, int, float], ir.Value]] = {
    "kl": _kl,
    "mse": lambda model, student, teacher, axis, temperature: _relative(model, student, teacher),
    "cosine": lambda model, student, teacher, axis, temperature: _angle(model, student, teacher),
}


def _mean_square(model: ir.Model, a: ir.Value, b: ir.Value) -> ir.Value:
    difference = _node(model, "Sub", [a, b])
    return _mean(model, _node(model, "Mul", [difference, difference]))


def _mean(model: ir.Model, value: ir.Value) -> ir.Value:
    return _node(model, "ReduceMean", [value], {"keepdims": 0})


def _constant(model: ir.Model, number: float) -> ir.Value:
    return add_initializer(model, "onnxprune.loss.constant", np.array(number, np.float32))


def _integers(model: ir.Model, *numbers: int) -> ir.Value:
    return add_initializer(model, "onnxprune.loss.integers", np.array(numbers, np.int64))


def _teacher(model: ir.Model, index: int, shape: Sequence[int]) -> ir.Value:
    return _input(model, f"onnxprune.teacher.{index}", ir.DataType.FLOAT, shape)


def _shape(value: ir.Value) -> Sequence[int]:
    return value.shape.numpy() if value.shape is not None else ()


def _input(model: ir.Model, name: str, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    """The input of that name, which is new, unless the user's own loss reads it too."""
    for value in model.graph.inputs:
        if value.name == name:
            return value
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    model.graph.inputs.append(value)
    return value


def _node(model: ir.Model, op: str, inputs: list[ir.Value], attributes: Attributes | None = None) -> ir.Value:
    node = ir.node(op, inputs, attributes or {})
    model.graph.append(node)
    node.outputs[0].name = f"onnxprune.loss.{sum(1 for _ in model.graph)}"
    node.name = node.outputs[0].name
    return node.outputs[0]
