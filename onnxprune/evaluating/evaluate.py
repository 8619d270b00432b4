"""Running models with onnxruntime, and how far two of them may differ."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TypeProto, helper
from onnxruntime import GraphOptimizationLevel, InferenceSession, SessionOptions

from onnxprune.errors import ModelError
from onnxprune.evaluating.data import Dataset, batches, fixed_batch, model_inputs, random_inputs
from onnxprune.graph.floats import spell_recurrent
from onnxprune.graph.model import open_model, open_session
from onnxprune.graph.shapes import (
    SCHEME_KEY,
    SEQUENCES_FIRST,
    Shapes,
    add_initializer,
    infer_shapes,
    replace_node,
    schemes_to_try,
)
from onnxprune.graph.threads import session_options

Array = NDArray[Any]
Batch = Mapping[str, Array]
BATCH = 64
RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
TOLERANCE, HALVES, STEPS = 1e-4, 1e-2, 3e-2


def unoptimised() -> SessionOptions:
    """Options for a session that computes what the graph says, operator by operator."""
    options = session_options()
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
    model = spell_recurrent(model)
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


def total_form(model: ir.Model) -> ir.Model:
    """The same model with functions of half of the numbers, such as a square root, made functions of all of them.

    Two models that agree so do the same with the same numbers, also where those would be NaN.
    """
    model = model.clone()
    for node in list(model.graph):
        if node.domain or node.op_type not in PARTIAL or node.inputs[0] is None:
            continue
        kind = node.inputs[0].dtype or node.outputs[0].dtype or ir.DataType.FLOAT
        if not kind.is_floating_point():
            continue
        steps = [ir.node("Abs", [node.inputs[0]], name=f"{node.name}.size")]
        for op, number in PARTIAL[node.op_type]:
            constant = add_initializer(model, f"{node.name}.{op}", np.array(number, kind.numpy()))
            steps.append(ir.node(op, [steps[-1].outputs[0], constant], name=f"{node.name}.{op}.done"))
        for step in steps:
            step.outputs[0].name = f"{step.name}.value"
        model.graph.insert_before(node, steps)
        node.replace_input_with(0, steps[-1].outputs[0])
    return model


PARTIAL: dict[str, tuple[tuple[str, float], ...]] = {  # what makes any number one that the function takes
    "Log": (("Add", 1e-3),), "Sqrt": (), "Pow": (("Add", 1e-3),), "Reciprocal": (("Add", 1e-3),),
    "Acosh": (("Add", 1.0),),
    "Acos": (("Min", 1.0),), "Asin": (("Min", 1.0),), "Atanh": (("Min", 0.99),),
}  # fmt: skip


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
