"""What is minimised: losses on labels, the user's own, and distance to the uncut model."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import numpy as np
import onnx_ir as ir

from onnxprune.cutting.plan import Plan
from onnxprune.errors import TrainingError, UsageError
from onnxprune.evaluating.data import Array, Dataset, class_axis, model_inputs
from onnxprune.evaluating.evaluate import all_shapes
from onnxprune.graph.shapes import Shapes
from onnxprune.labels.flow import integer
from onnxprune.training.own_loss import OwnLoss, load_own_loss

LABELS = "onnxprune.labels"  # the name of their input; those of a further output have its name behind
Kind = Literal["cross-entropy", "bce", "mse", "l1"]
KINDS: tuple[Kind, ...] = ("cross-entropy", "bce", "mse", "l1")
DistanceKind = Literal["kl", "mse", "cosine"]
DISTANCE_KINDS: tuple[DistanceKind, ...] = ("kl", "mse", "cosine")
K = TypeVar("K", Kind, DistanceKind)
BEHIND = {"cross-entropy": ("Softmax", "LogSoftmax"), "bce": ("Sigmoid",)}  # what makes probabilities of the scores


@dataclass(frozen=True)
class Loss:
    """What is asked of the loss.

    `labels` are losses on labels, each `[OUTPUT=]KIND[:WEIGHT]`, or one of the user's own (`load_own_loss`); none
    means that kinds are chosen by the labels. `distances` to the teacher are `[VALUE=]KIND[:WEIGHT]`, of outputs or
    inner values; none means all outputs. `distillation` is the teacher's share of the loss, `temperature` that of
    distillation between classes, `smoothing` the share of each label that is spread over all classes.
    `features` weighs inner values against the teacher's, beside the rest, where there is distillation. With `mix`,
    pairs of samples are mixed in shares drawn from Beta(mix, mix) (Zhang et al. 2018, mixup, section 2).
    """

    labels: tuple[str, ...] = ()
    distances: tuple[str, ...] = ()
    distillation: float = 0.5
    temperature: float = 2.0
    smoothing: float = 0.0
    features: float = 1.0
    mix: float = 0.0


@dataclass(frozen=True)
class LabelLoss:
    """A loss on labels: of which value (scores before a final Softmax or Sigmoid, or an output), against which input.

    Classes lie along `axis`. Where labels are `sparse`, those below 0 don't count.
    """

    kind: Kind
    value: str
    labels: str
    axis: int = -1
    weight: float = 1.0
    sparse: bool = False


@dataclass(frozen=True)
class Distance:
    """How a value is compared with the teacher's.

    By KL divergence over classes along `axis`, mean square error, or one minus the cosine of each sample. What weighs
    nothing is only looked at. With a `unit`, what the best constant answer has, the distance is counted in that: 1 is
    then no better than a constant, for every value.
    """

    value: str
    kind: DistanceKind
    axis: int = -1
    weight: float = 1.0
    unit: float | None = None


@dataclass(frozen=True)
class LossPlan:
    """What is minimised: losses on labels, if there are any, and distances to the uncut model, `share` of the whole.

    The first distances are those of the outputs, in order. `features` are inner values that are compared as well, each
    weighed by `weight`; of those that were cut the teacher gives what is `kept`: the positions along each such axis.
    """

    labels: tuple[LabelLoss, ...]
    distances: tuple[Distance, ...]
    share: float  # of the distances, in [0, 1]
    own: OwnLoss | None = None
    temperature: float = 2.0
    smoothing: float = 0.0
    features: tuple[str, ...] = ()
    weight: float = 0.0
    mix: float = 0.0
    kept: Mapping[str, Sequence[tuple[int, Sequence[int]]]] = field(default_factory=dict)

    @property
    def values(self) -> tuple[str, ...]:
        """The values that the model is judged by: of each output, then inner ones that were asked for."""
        return tuple(distance.value for distance in self.distances)

    @property
    def compared(self) -> tuple[str, ...]:
        """All that the teacher is asked for, in order."""
        return (*self.values, *self.features, *(self.own.teachers.values() if self.own else ()))

    def targets(self, data: Dataset) -> dict[str, Array]:
        """The labels that the losses read, by the name of their input."""
        found = {}
        for loss in self.labels:
            labels = data.labels_of(loss.labels.removeprefix(LABELS).removeprefix("."))
            assert labels is not None
            found[loss.labels] = labels.astype(np.int64 if loss.kind == "cross-entropy" else np.float32)
        for key, kind in (self.own.labels if self.own else {}).values():
            labels = data.labels_of(key)
            assert labels is not None
            found[input_name(key)] = labels.astype(kind.numpy())
        return found


def plan_loss(model: ir.Model, data: Dataset, asked: Loss | None = None) -> LossPlan:
    """The loss for a model and data: labels and distillation, or distillation alone without labels.

    Raises `UsageError` for a loss that the labels or the model don't fit, or a value that the model hasn't, and
    `TrainingError` for a model without an output to learn from.
    """
    asked = asked or Loss()
    outputs = {v.name or "": v for v in model.graph.outputs if v.dtype is None or v.dtype.is_floating_point()}
    if not outputs:
        raise TrainingError("no output of the model is a float, so there is nothing to learn from; use --epochs 0")
    if asked.mix and not all(value.dtype == ir.DataType.FLOAT for value in model_inputs(model)):
        raise UsageError("--mix mixes samples, which takes inputs of float32")
    own = [text for text in asked.labels if _split("loss", text, KINDS) is None]
    if len(asked.labels) > 1 and own:
        raise UsageError(
            f"--loss {own[0]} isn't one of {', '.join(KINDS)}, and a loss of your own can't be combined with others"
        )
    wanted: list[tuple[str, Kind | None, float]] = [
        split for text in asked.labels if (split := _split("loss", text, KINDS)) is not None
    ]
    if not asked.labels:
        wanted += [(name, None, 1.0) for name in outputs if data.labels_of(_key(model, name)) is not None]
    losses = dict(_label_loss(model, data, outputs, *each) for each in wanted)
    if len(losses) < len(wanted):
        raise UsageError("--loss: give each output one loss")
    distances = tuple(_distance(value, losses.get(name)) for name, value in outputs.items())
    if asked.distances:
        distances = _named_distances(model, asked.distances, dict(zip(outputs, distances, strict=True)))
    share = asked.distillation if losses or own else 1.0
    return LossPlan(
        tuple(losses.values()), distances, share, load_own_loss(own[0], model, data) if own else None,
        asked.temperature, asked.smoothing, mix=asked.mix,
    )  # fmt: skip


def _split(option: str, text: str, kinds: Sequence[K]) -> tuple[str, K, float] | None:
    """The name (or ""), kind and weight of `[NAME=]KIND[:WEIGHT]`; None for what isn't of that form."""
    name, _, rest = text.rpartition("=")
    word, _, weight = rest.partition(":")
    kind = next((each for each in kinds if each == word), None)
    if kind is None:
        return None
    try:
        return name, kind, float(weight or 1)
    except ValueError:
        raise UsageError(f"--{option} {text}: {weight!r} is no weight; give [NAME=]KIND[:WEIGHT]") from None


def _named_distances(model: ir.Model, asked: Sequence[str], outputs: dict[str, Distance]) -> tuple[Distance, ...]:
    """The outputs' distances, as they are asked for or without a weight, and those of inner values."""
    inner = {value.name or "": value for node in model.graph for value in node.outputs}
    found = {name: replace(distance, weight=0.0) for name, distance in outputs.items()}
    named = set[str]()
    for text in asked:
        split = _split("distil", text, DISTANCE_KINDS)
        if split is None:
            raise UsageError(f"--distil {text}: give [VALUE=]KIND[:WEIGHT], of {', '.join(DISTANCE_KINDS)}")
        name, kind, weight = split[0] or next(iter(outputs)), split[1], split[2]
        if name in outputs:
            found[name] = replace(found[name], kind=kind, weight=weight)
        elif name in inner:
            found[name] = Distance(name, kind, _class_axis(inner[name], None), weight)
        else:
            near = difflib.get_close_matches(name, {**outputs, **inner}, cutoff=0)
            raise UsageError(f"--distil {text}: the model has no value {name!r}; the nearest are {', '.join(near)}")
        if name in named:
            raise UsageError(f"--distil {text}: give each value one distance")
        named.add(name)
    return tuple(found.values())


def check_comparable(model: ir.Model, teacher: ir.Model, loss: LossPlan) -> None:
    """Raises `TrainingError` for a value that is to be compared and lost some of its channels."""
    shapes, wholes = all_shapes(model), all_shapes(teacher)
    values = ({value.name: value for node in each.graph for value in node.outputs} for each in (model, teacher))
    here, there = values
    for distance in loss.distances:
        found, whole = shapes(here[distance.value]), wholes(there[distance.value])
        if distance.weight > 0 and found != whole:
            raise TrainingError(
                f"--distil {distance.value}: the cut model's {found} can't be compared with the uncut model's {whole}; "
                "protect the parameters of its layer (--protect), or name another value"
            )


def in_units(loss: LossPlan, answers: Sequence[Array]) -> LossPlan:
    """The same loss with every distance of an output in units of what the best constant answer has.

    `answers` are the teacher's values that are compared, in order. Outputs of any size then count alike, and the loss
    is what fidelity is measured by: error beside the spread over samples. Of values without spread nothing is learned.
    """
    distances = []
    for distance, values in zip(loss.distances, answers, strict=False):
        unit = _UNITS[distance.kind](np.asarray(values, np.float64), distance.axis, loss.temperature)
        known = np.isfinite(unit) and unit > LEAST_UNIT * max(
            float(np.square(values, dtype=np.float64).mean()), LEAST_UNIT
        )
        distances.append(replace(distance, unit=unit) if known else replace(distance, weight=0.0))
    return replace(loss, distances=tuple(distances)) if any(each.weight > 0 for each in distances) else loss


def _variance(values: Array, axis: int, temperature: float) -> float:
    return float(np.square(values - values.mean(0)).mean())


def _divergence(values: Array, axis: int, temperature: float) -> float:
    """T^2 KL(p || mean p): of all constants the mean has the least."""
    shifted = (values - values.max(axis, keepdims=True)) / temperature
    p = np.exp(shifted) / np.exp(shifted).sum(axis, keepdims=True)
    products = p * (np.log(np.maximum(p, 1e-30)) - np.log(np.maximum(p.mean(0), 1e-30)))
    return float(temperature**2 * products.sum(axis).mean())


def _turn(values: Array, axis: int, temperature: float) -> float:
    """One minus the cosine to the mean of all directions."""
    rows = values.reshape(len(values), -1)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    return float(1 - np.linalg.norm(rows.mean(0)))


LEAST_UNIT = 1e-10
_UNITS: dict[str, Callable[[Array, int, float], float]] = {"mse": _variance, "kl": _divergence, "cosine": _turn}


def _label_loss(
    model: ir.Model, data: Dataset, outputs: dict[str, ir.Value], output: str, kind: Kind | None, weight: float
) -> tuple[str, LabelLoss]:
    """The output's name, and the loss on its labels."""
    output = output or (model.graph.outputs[0].name or "")
    if output not in outputs:
        raise UsageError(f"--loss {output}={kind}: the model's outputs are {list(outputs)}")
    labels = data.labels_of(key := _key(model, output))
    if labels is None:
        raise UsageError(f"--loss {kind} needs labels, which the data lacks: array 'labels{key and '.'}{key}'")
    floats = labels.dtype.kind == "f"
    kind = kind or ("mse" if floats else "cross-entropy")
    if (kind == "cross-entropy") == floats:
        raise UsageError(f"--loss {kind} doesn't fit labels of type {labels.dtype}")
    value = outputs[output]
    axis = _class_axis(value, labels.shape) if kind == "cross-entropy" else -1
    scores = scores_behind(value, BEHIND.get(kind, ()))
    sparse = kind == "cross-entropy" and bool(labels.size) and int(labels.min()) < 0
    return output, LabelLoss(kind, scores.name or "", input_name(key), axis, weight, sparse)


def _distance(output: ir.Value, loss: LabelLoss | None) -> Distance:
    """How an output is compared with the teacher's."""
    scores = scores_behind(output, BEHIND["cross-entropy"])
    if loss is not None:
        return Distance(loss.value, "kl" if loss.kind == "cross-entropy" else "mse", loss.axis, loss.weight)
    if scores is not output:
        return Distance(scores.name or "", "kl", _class_axis(output, None))
    return Distance(output.name or "", "mse")


def _key(model: ir.Model, output: str) -> str:
    """The name of an output's labels: the first output's have none."""
    return "" if output == model.graph.outputs[0].name else output


def input_name(key: str) -> str:
    """The name of the graph input for an output's labels, or those of the first output for ""."""
    return f"{LABELS}.{key}" if key else LABELS


def _class_axis(output: ir.Value, labels_shape: Sequence[int] | None) -> int:
    """The axis of class scores: that of a final Softmax, or as the labels have it, or the last."""
    node = output.producer()
    if node is not None and node.op_type in BEHIND["cross-entropy"]:
        return integer(node, "axis", -1)
    return class_axis(list(output.shape or ()), labels_shape or ())


def with_features(model: ir.Model, teacher: ir.Model, loss: LossPlan, weight: float, plan: Plan | None) -> LossPlan:
    """The loss with inner values of a cut model held against the teacher's: the last of each size along its trunk.

    On the trunk lie values that everything behind them hangs on alone. Of what was cut by `plan` the positions that are
    left are compared, as repair fits them. Comparing them gives each stage a target of its own (Romero et al. 2015,
    FitNets, section 2.2), which few samples tell more about than the outputs alone.
    """
    shapes, wholes = all_shapes(model), all_shapes(teacher)
    there = {value.name: value for node in teacher.graph for value in node.outputs}
    removed = plan.tensors if plan is not None else {}
    found: dict[tuple[int | None, ...], str] = {}
    kept = dict[str, Sequence[tuple[int, Sequence[int]]]]()
    for value in _trunk(model, shapes):
        name, shape = value.name or "", shapes(value)
        if shape is None or len(shape) < 3 or name not in there or name in loss.values or value.is_graph_output():
            continue
        whole, left = list(wholes(there[name]) or ()), list[tuple[int, Sequence[int]]]()
        for each in removed.get(name, ()):
            if each.axis < len(whole) and whole[each.axis] == each.size:
                left.append((each.axis, sorted(set(range(each.size)) - set(each.removed))))
                whole[each.axis] = len(left[-1][1])
        if tuple(whole) == tuple(shape):
            found[shape[1:]] = name
            kept[name] = left
    names = tuple(found.values())
    return replace(loss, features=names, weight=weight, kept={name: kept[name] for name in names if kept[name]})


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
