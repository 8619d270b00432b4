"""The loss as ordinary nodes of the training graph, chosen from what the data and the model's outputs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxprune.data import Dataset
from onnxprune.shapes import add_initializer

TEMPERATURE = 2.0
Kind = Literal["cross-entropy", "mse", "none"]


@dataclass(frozen=True)
class LossPlan:
    """What is minimised: a loss on labels, and a distillation loss from the uncut model.

    `values` are the values compared with the teacher (class scores before a final Softmax, or the outputs).
    """

    labels: Kind
    distillation: Literal["kl", "mse"]
    share: float  # of the distillation loss, in [0, 1]
    values: tuple[str, ...]


def plan_loss(model: ir.Model, data: Dataset, share: float = 0.5) -> LossPlan:
    """The loss for a model and data: labels and distillation in equal parts, or distillation alone without labels."""
    outputs = [value for value in model.graph.outputs if value.dtype is None or value.dtype.is_floating_point()]
    scores = [class_scores(value) for value in outputs]
    softmax = bool(outputs) and scores[0] is not outputs[0]
    if data.labels is None:
        kind: Literal["kl", "mse"] = "kl" if softmax and len(outputs) == 1 else "mse"
        names = [v.name or "" for v in (scores if kind == "kl" else outputs)]
        return LossPlan("none", kind, 1.0, tuple(names))
    if data.labels.dtype.kind == "f":
        return LossPlan("mse", "mse", share, (outputs[0].name or "",))
    return LossPlan("cross-entropy", "kl", share, (scores[0].name or "",))


def class_scores(output: ir.Value) -> ir.Value:
    """What a final Softmax normalises, or the output itself."""
    node = output.producer()
    if node is not None and node.op_type in ("Softmax", "LogSoftmax") and node.inputs[0] is not None:
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
    if plan.labels == "cross-entropy":
        labels = _input(model, "onnxprune.labels", ir.DataType.INT64, labels_shape or ())
        loss = _node(
            model, "SoftmaxCrossEntropyLoss", [_classes_second(model, students[0], len(labels_shape or ())), labels]
        )
        terms.append((1 - plan.share, loss))
    elif plan.labels == "mse":
        labels = _input(model, "onnxprune.labels", ir.DataType.FLOAT, labels_shape or ())
        terms.append((1 - plan.share, _mean_square(model, students[0], labels)))
    if plan.share > 0:
        for index, student in enumerate(students):
            shape = student.shape.numpy() if student.shape is not None else ()
            teacher = _input(model, f"onnxprune.teacher.{index}", ir.DataType.FLOAT, shape)
            part = _kl(model, student, teacher) if plan.distillation == "kl" else _relative(model, student, teacher)
            terms.append((plan.share / len(students), part))
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


def _classes_second(model: ir.Model, scores: ir.Value, label_rank: int) -> ir.Value:
    """SoftmaxCrossEntropyLoss wants (N, C, ...): positions come before classes in (N, S, C) outputs."""
    if label_rank < 2:
        return scores
    rank = label_rank + 1
    return _node(model, "Transpose", [scores], {"perm": [0, rank - 1, *range(1, rank - 1)]})


def _kl(model: ir.Model, student: ir.Value, teacher: ir.Value) -> ir.Value:
    """T^2 KL(teacher || student) at temperature T, mean over positions (Hinton et al. 2015, section 2)."""
    t = _constant(model, TEMPERATURE)
    log_q = _node(model, "LogSoftmax", [_node(model, "Div", [student, t])], {"axis": -1})
    cooled = _node(model, "Div", [teacher, t])
    p, log_p = (_node(model, op, [cooled], {"axis": -1}) for op in ("Softmax", "LogSoftmax"))
    products = _node(model, "Mul", [p, _node(model, "Sub", [log_p, log_q])])
    axes = add_initializer(model, "onnxprune.kl.axes", np.array([-1], np.int64))
    mean = _mean(model, _node(model, "ReduceSum", [products, axes], {"keepdims": 0}))
    return _node(model, "Mul", [mean, _constant(model, TEMPERATURE**2)])


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
