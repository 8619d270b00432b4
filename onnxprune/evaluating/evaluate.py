"""Running models with onnxruntime, and measuring how good they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TypeProto, helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

from onnxprune.errors import DataError, ModelError, UsageError
from onnxprune.evaluating.data import IGNORED, Dataset, batches, fixed_batch, model_inputs, random_inputs
from onnxprune.evaluating.sources import load_function
from onnxprune.graph.model import open_model, open_session
from onnxprune.graph.shapes import SCHEME_KEY, SEQUENCES_FIRST, Shapes, infer_shapes, replace_node, schemes_to_try

Array = NDArray[Any]
Batch = Mapping[str, Array]
BATCH = 64
RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
TOLERANCE, HALVES, STEPS = 1e-4, 1e-2, 3e-2


def session_options(threads: int | None) -> SessionOptions:
    """Options for a session with this many threads (None: onnxruntime's choice)."""
    options = SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    return options


def unoptimised() -> SessionOptions:
    """Options for a session that computes what the graph says, operator by operator."""
    options = SessionOptions()
    options.graph_optimization_level = GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # what isn't fused needs a lot of memory: it goes back at once
    options.enable_mem_pattern = False
    return options


def run_model(model: ir.Model, inputs: Batch) -> list[Array]:
    """The outputs of one run. Raises `ModelError` when onnxruntime refuses or fails."""
    return run_session(open_session(model), inputs)


def run_on_all(model: ir.Model, inputs: Sequence[Batch], session: InferenceSession | None = None) -> list[Array]:
    """The outputs of a model on one set of inputs after the other, by the graph's own arithmetic: nothing is fused."""
    session = session or open_session(model, unoptimised())
    return [array for each in inputs for array in run_session(session, each)]


def all_shapes(model: ir.Model) -> Shapes:
    """The shapes of every value of a model that runs: inferred, and where inference can't tell, observed."""
    return infer_shapes(model, partial(_observed_types, model))


def _observed_types(model: ir.Model, which: int, values: list[ir.Value]) -> dict[str, TypeProto]:
    """The types of values when the model runs at the sizes of a shape walk.

    Values whose shape depends on the data (it differs between two runs), and what isn't a tensor, are left out.
    """
    outputs = list(model.graph.outputs)
    wanted = [value for value in values if value not in outputs]
    try:
        model.graph.outputs.extend(wanted)
        session = open_session(model)
    finally:
        model.graph.outputs.clear()
        model.graph.outputs.extend(outputs)
    runs = []
    for seed in (0, 1):
        arrays = run_session(session, random_inputs(model, seed, batch=None, walk=which))[len(outputs) :]
        runs.append({value.name or "": array for value, array in zip(wanted, arrays, strict=True)})
    first, second = runs
    return {
        name: helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in first.items()
        if isinstance(array, np.ndarray) and array.dtype.kind in "fiub" and array.shape == second[name].shape
    }


def run_session(session: InferenceSession, inputs: Batch) -> list[Array]:
    """The outputs of one run of an open session. Raises `ModelError` with the reason when it fails."""
    names = {value.name for value in session.get_inputs()}
    try:
        return cast(
            list[Array], list(session.run(None, {name: array for name, array in inputs.items() if name in names}))
        )
    except Exception as error:  # onnxruntime raises a dozen unrelated types here
        raise ModelError(f"onnxruntime failed to run the model: {str(error).splitlines()[0]}") from error


def inputs_to_time(
    path: str | os.PathLike[str], seed: int, batch: int, shapes: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Array]:
    """Random inputs for a model in a file, of the first sizes of its dynamic dimensions that it runs at.

    A normalised model knows those. `shapes` as for `random_inputs`. Raises `ModelError` when it runs at none.
    """
    model = open_model(path)
    known, dynamic = SCHEME_KEY in model.metadata_props, list(schemes_to_try(model))
    if known or not dynamic:
        return random_inputs(model, seed, batch, shapes=shapes)
    session, reason = open_session(model), ModelError("")
    for scheme in dict.fromkeys([0, *dynamic] if dynamic[0] == SEQUENCES_FIRST[0] else dynamic):  # not the shortest
        model.metadata_props[SCHEME_KEY] = str(scheme)
        inputs = random_inputs(model, seed, batch, shapes=shapes)
        try:
            run_session(session, inputs)
            return inputs
        except ModelError as error:
            reason = reason if str(reason) else error
    raise reason


def predict(model: ir.Model, data: Dataset, threads: int | None = None) -> list[Array]:
    """All outputs of a model on a data set, in order, with the samples along the first axis.

    Of recurrent models, whose outputs may go by time first, they are moved there; what a model says of a batch of one
    is a sample even without such an axis. A model with a fixed batch gets its last batch filled up.
    """
    session = open_session(model, session_options(threads))
    fixed, first = fixed_batch(model), next(iter(model_inputs(model)[0].shape or ()), None)
    parts: list[list[Array]] = []
    for batch in batches(data, fixed or BATCH):
        count = len(next(iter(batch.values())))
        if fixed is not None and count < fixed:
            batch = {name: np.concatenate([a, np.repeat(a[-1:], fixed - count, 0)]) for name, a in batch.items()}
        size = fixed or count
        made = zip(model.graph.outputs, run_session(session, batch), strict=True)
        outputs = [_by_sample(value, array, size, first) for value, array in made]
        parts.append([a[:count] if a.ndim and len(a) == size else a for a in outputs])
    return [_joined(value, column) for value, column in zip(model.graph.outputs, zip(*parts, strict=True), strict=True)]


def _by_sample(value: ir.Value, array: Array, size: int, first: Any) -> Array:
    """An output of a batch of that size with its samples along the first axis, where one may be theirs.

    `first` is the first dimension of the inputs: what is declared like it is taken before what only has the size.
    """
    declared = list(value.shape) if value.shape is not None else [first] * array.ndim
    alike = [isinstance(dim, int) == isinstance(first, int) for dim in declared]
    axes = [axis for axis, (like, found) in enumerate(zip(alike, array.shape, strict=False)) if like and found == size]
    axes.sort(key=lambda axis: declared[axis] != first)
    if axes:
        return np.moveaxis(array, axes[0], 0)
    return array[None] if first == 1 and array.ndim else array


def _joined(value: ir.Value, parts: Sequence[Array]) -> Array:
    try:
        return np.concatenate(parts) if parts[0].ndim else np.stack(parts)
    except ValueError as error:
        sizes = sorted({str(part.shape) for part in parts})
        raise ModelError(
            f"output {value.name!r} has another shape from batch to batch ({sizes[0]}, {sizes[-1]}), so models can't "
            "be compared by it: end it before what decides how much it gives, or use 'onnxprune prune'"
        ) from error


def comparable_form(model: ir.Model) -> ir.Model:
    """The same model without what makes equal models differ: the rounding of quantised activations, and chance.

    What is quantised and dequantised again passes as it is (rounding turns tiny differences into steps); weights keep
    their rounding. Random numbers are drawn by seeds, one after the other.
    """
    if not any(node.op_type in ("QuantizeLinear", "MatMulNBits", *RANDOM) for node in model.graph):
        return model
    model = model.clone()
    drawn = 0
    for node in list(model.graph):
        if node.op_type in RANDOM:
            drawn += 1
            node.attributes["seed"] = ir.AttrFloat32("seed", float(drawn))
        node.attributes.pop("accuracy_level", None)  # products of activations that are rounded to integers
        source = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        value = source.inputs[0] if source is not None and source.op_type == "QuantizeLinear" else None
        if value is not None and not value.is_initializer() and (value.producer() or node).op_type != "Constant":
            replace_node(model, node, ir.node("Identity", [value], name=node.name))
    return model


def tolerance(model: ir.Model) -> float:
    """How far two forms of a model may differ, relative to the largest output.

    Far above the rounding of the model's numbers and far below any mistake; a step or two where activations are
    quantised on the fly.
    """
    if any(node.op_type == "DynamicQuantizeLinear" for node in model.graph):
        return STEPS
    half = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    return HALVES if any(v.dtype in half for v in model.graph.initializers.values()) else TOLERANCE


def relative_difference(expected: Any, found: Any) -> float:
    """The largest difference over the largest magnitude expected; NaNs and infinities must agree in place.

    Sequences are compared element by element; optionals that are empty, and maps, must be equal.
    """
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return max((relative_difference(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)
    if not isinstance(expected, np.ndarray) or not isinstance(found, np.ndarray):
        return 0.0 if type(expected) is type(found) and expected == found else float("inf")
    if expected.shape != found.shape:
        return float("inf")
    if expected.dtype.kind not in "fc" and expected.dtype.name != "bfloat16":
        return 0.0 if np.array_equal(expected, found) else float("inf")
    a, b = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = max(float(np.abs(a[finite]).max()), 1e-30)
    return float(np.abs(a[finite] - b[finite]).max()) / scale


@dataclass(frozen=True)
class Metric:
    """A number for a model's outputs. `compute(outputs, labels, reference outputs of the uncut model)`."""

    name: str
    compute: Callable[[list[Array], Array | None, list[Array]], float]
    higher_is_better: bool = True
    needs_labels: bool = False

    def drop(self, baseline: float, value: float) -> float:
        """How many points were lost; negative when the value is better than the baseline."""
        return baseline - value if self.higher_is_better else value - baseline


def _rows(array: Array) -> NDArray[np.float64]:
    """Class scores as (positions, classes)."""
    return (
        array.astype(np.float64).reshape(-1, array.shape[-1]) if array.ndim > 1 else array.astype(np.float64)[:, None]
    )


def _top(k: int) -> Callable[[list[Array], Array | None, list[Array]], float]:
    def compute(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
        scores, wanted = _rows(outputs[0]), np.ravel(labels if labels is not None else [])
        if wanted.dtype.kind not in "iu" or len(wanted) != len(scores):
            raise DataError(f"{_beside(outputs, labels)}: top{k} wants one class index (int64) for each row of scores")
        scores, wanted = scores[wanted != IGNORED], wanted[wanted != IGNORED]
        better = (scores > np.take_along_axis(scores, wanted[:, None], 1)).sum(1)
        return float((better < k).mean() * 100)

    return compute


def _beside(outputs: list[Array], labels: Array | None) -> str:
    """What doesn't fit, for a message."""
    given = np.asarray(labels)
    return f"array 'labels' is {given.dtype} of shape {given.shape}, the first output has shape {outputs[0].shape}"


def _errors(outputs: list[Array], labels: Array | None) -> NDArray[np.float64]:
    """The differences between what is and what should be, element by element."""
    found, wanted = outputs[0].astype(np.float64).ravel(), np.ravel(np.asarray(labels, np.float64))
    if len(found) != len(wanted):
        raise DataError(f"{_beside(outputs, labels)}: give a number for each of the output's, or class indices (int64)")
    return np.asarray(found - wanted)


def _mse(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
    return float(np.mean(np.square(_errors(outputs, labels))))


def _mae(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
    return float(np.mean(np.abs(_errors(outputs, labels))))


def _by_function(name: str) -> Metric:
    """A function of the user's."""
    try:
        function = load_function(name)
    except DataError as error:
        raise UsageError(f"--metric {error}") from error

    def compute(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
        try:
            return float(function(outputs, labels))
        except Exception as error:
            raise UsageError(f"metric {name} failed: {type(error).__name__}: {error}") from error

    return Metric(name, compute)


def _cosine(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
    """Mean over samples and outputs of the cosine between the pruned and the uncut model's outputs, times 100.

    Outputs that have another shape, as what is found differs, say nothing. Raises `ModelError` where all have.
    """
    values, pairs = [], [(a, b) for a, b in zip(outputs, reference, strict=True) if a.shape == b.shape]
    if not pairs:
        raise ModelError(
            f"the outputs have other shapes than the uncut model's ({outputs[0].shape}, {reference[0].shape}), so "
            "models can't be compared by them: end it before what decides how much it gives, or use 'onnxprune prune'"
        )
    for a, b in pairs:
        x, y = (np.asarray(v, np.float64).reshape(len(v) if v.ndim else 1, -1) for v in (a, b))
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        same = (x == y).all(1)
        values.append(np.where(same, 1.0, (x * y).sum(1) / np.maximum(norms, 1e-30)).mean())
    return float(np.mean(values) * 100)


def log_probabilities(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-softmax of rows of scores; rows that are probabilities already only take the logarithm."""
    if (scores >= 0).all() and np.allclose(scores.sum(-1), 1, atol=1e-3):
        return np.asarray(np.log(np.maximum(scores, 1e-30)), np.float64)
    shifted = scores - scores.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)), np.float64)


def _kl(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
    """Mean KL divergence from the uncut model's class probabilities, in nats."""
    p, q = log_probabilities(_rows(reference[0])), log_probabilities(_rows(outputs[0]))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _agreement(outputs: list[Array], labels: Array | None, reference: list[Array]) -> float:
    return float((_rows(outputs[0]).argmax(-1) == _rows(reference[0]).argmax(-1)).mean() * 100)


METRICS = {
    "mse": Metric("mse", _mse, higher_is_better=False, needs_labels=True),
    "mae": Metric("mae", _mae, higher_is_better=False, needs_labels=True),
    "cosine": Metric("cosine", _cosine),
    "kl": Metric("kl", _kl, higher_is_better=False),
    "agreement": Metric("agreement", _agreement),
}


def find_metric(name: str | None, data: Dataset) -> Metric:
    """The metric of that name; by default top-1 accuracy, MSE for float labels, and cosine fidelity without labels.

    `topK` is accuracy in percent; cosine and agreement are percent of the uncut model's outputs; `module:function` is
    called with (outputs: list of arrays, labels) and returns a float where higher is better.
    Raises `UsageError` for an unknown name, `DataError` when it needs labels and there are none.
    """
    if name is None:
        if data.labels is None:
            return METRICS["cosine"]
        name = "mse" if data.labels.dtype.kind == "f" else "top1"
    if ":" in name:
        return _by_function(name)
    if name.startswith("top") and name[3:].isdigit() and int(name[3:]) > 0:
        metric = Metric(name, _top(int(name[3:])), needs_labels=True)
    elif name in METRICS:
        metric = METRICS[name]
    else:
        raise UsageError(f"no metric is called {name!r}; known: topK, {', '.join(METRICS)}, module:function")
    if metric.needs_labels and data.labels is None:
        raise DataError(f"metric {name} needs labels: add an array 'labels', or use cosine, kl or agreement")
    return metric
