"""From any ordinary model to one form that the analysis reads: the same function, the same inputs and outputs.

Local functions are inlined, old opsets converted, initializers taken out of the inputs, constants lifted and folded,
shape arithmetic made constant, and initializers that several nodes share cloned. BatchNormalization stays as it is:
scoring, repair and fine-tuning want it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx import version_converter
from onnx_ir.passes import common
from onnxruntime import InferenceSession

from onnxprune.cutting.standin import needed, stand_in_session
from onnxprune.errors import ModelError
from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import (
    RANDOM,
    STEPS,
    Array,
    comparable_form,
    relative_difference,
    run_model,
    run_on_all,
    run_session,
    tolerance,
    unoptimised,
)
from onnxprune.graph.model import give_back, open_session, weight_bytes, weights_aside
from onnxprune.graph.shapes import SCHEME_KEY, add_initializer, dynamic_sizes, schemes_to_try
from onnxprune.normalising.arithmetic import simplify_shape_arithmetic
from onnxprune.normalising.integers import has_integers, spell_out_integers
from onnxprune.normalising.packed import take_apart
from onnxprune.normalising.unroll import unroll
from onnxprune.normalising.untie import pick_from_parts, untie

OLDEST_OPSET = 17  # LayerNormalization, and BatchNormalization as training knows it
COMPATIBLE_OPSET = 13  # from here to there operators only gained attributes: what the converter lacks is as it was
PAIRED = {0: 2, 1: 3}  # sizes, and others like them in which all first dimensions differ, that are tried as well
OLDEST_IR = 8  # from 4 on, initializers needn't be inputs
NEVER_FOLDED = {*RANDOM, "SequenceConstruct", "SequenceAt", "DequantizeLinear"}  # weights stay quantised
MOST_FOLDED = 2**26  # bytes of a folded constant, unless the model's weights are larger anyway


def normalise(model: ir.Model) -> ir.Model:
    """The normalised form of a model, checked to compute the same on random inputs.

    Raises:
        ModelError: onnxruntime can't run the model, its opset can't be converted, or the normalised form computes
            something else (which would be a fault of this package).
    """
    model = _spelt_out(model)
    trials = _sizes_that_run(model)
    for index, trial in trials.items():
        normal = _normalised(model, index)
        # the first choice is held against all: dimensions that are one in it may be two; the others against their own
        checks = trials if trial is next(iter(trials.values())) else {index: trial}
        worst = max(_difference(model, normal, *check) for check in checks.values())
        if worst <= tolerance(normal):
            return normal
    raise ModelError(f"normalising changed what the model computes (relative difference {worst:.1e}); not pruned")


def _spelt_out(model: ir.Model) -> ir.Model:
    """The model with its integer operators spelt out, if it has any, and if that computes the same in onnxruntime.

    Fused again, that is: unfused, sums that end half-way between two integers are rounded in other ways.
    """
    if not has_integers(model):
        return model
    other = model.clone()
    _clean(other)
    other = _convert_opset(other)
    _clean(other)
    spell_out_integers(other)
    try:
        inputs, _ = next(iter(_sizes_that_run(other).values()))
        before, after = (run_on_all(each, inputs, open_session(each)) for each in (model, other))
    except ModelError:
        return model
    differences = [relative_difference(a, b) for a, b in zip(before, after, strict=True)]
    return other if max(differences, default=0.0) <= STEPS else model


Trial = tuple[list[dict[str, Array]], list[Array]]  # inputs of both shape walks, and what the model makes of them


def _sizes_that_run(model: ir.Model) -> dict[int, Trial]:
    """One or two choices of sizes for the dynamic dimensions with which the model runs, by their index in SCHEMES.

    Raises `ModelError` with onnxruntime's reason when it runs at no sizes.
    """
    chance = any(node.op_type in RANDOM for node in model.graph)
    session: InferenceSession | None = None
    reason, found, model = ModelError(""), dict[int, Trial](), model.clone()
    pending, tried = list(schemes_to_try(model) or (0,)), list[object]()
    while pending:
        index = pending.pop(0)
        model.metadata_props[SCHEME_KEY] = str(index)
        sizes = [dynamic_sizes(model, walk) for walk in (0, 1)]
        if sizes in tried:
            continue
        tried.append(sizes)
        walks = [random_inputs(model, seed=0, batch=None, walk=walk) for walk in (0, 1)]
        if session is None or chance:  # random numbers start anew with each session
            session = stand_in_session(model) if needed(model) else open_session(comparable_form(model), unoptimised())
        try:
            found[index] = walks, [array for inputs in walks for array in run_session(session, inputs)]
            pending = [PAIRED[index]] if index in PAIRED and len(found) == 1 else []
        except ModelError as error:
            reason = reason if str(reason) else error
    if not found:
        raise reason
    return found


def _normalised(model: ir.Model, sizes: int) -> ir.Model:
    """A normalised copy, with these sizes of dynamic dimensions noted in its metadata."""
    model = model.clone()
    model.metadata_props[SCHEME_KEY] = str(sizes)
    _clean(model)
    model = _convert_opset(model)
    _clean(model)
    _fold_constants(model)
    left, before = -1, None
    while left != before and left != 0:  # a condition may hang on sizes that are known only behind another one
        model = unroll(model, _fold_constants)
        simplify_shape_arithmetic(model)
        _fold_constants(model)
        left, before = sum(node.op_type in ("If", "Loop") for node in model.graph), left
    take_apart(model)
    pick_from_parts(model)
    _clean(model)
    _unshare_initializers(model)
    _name_everything(model)
    untie(model)
    return model


def _difference(original: ir.Model, normal: ir.Model, inputs: list[dict[str, Array]], expected: list[Array]) -> float:
    """The largest relative difference between two forms; infinite where the normal one doesn't run."""
    light = needed(original, normal)
    if needed(original) and not light:  # its weights were changed: only the real ones will do
        expected = run_on_all(comparable_form(original), inputs)
    try:
        found = run_on_all(comparable_form(normal), inputs, stand_in_session(normal) if light else None)
    except ModelError:
        return float("inf")
    return max((relative_difference(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)


def _clean(model: ir.Model) -> None:
    nested = any(graph is not model.graph for graph in model.graphs())
    for step in (
        common.InlinePass(),
        common.RemoveInitializersFromInputsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        *([] if nested else [common.IdentityEliminationPass()]),  # a subgraph must not return an outer value itself
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
    ):
        step(model)
    model.ir_version = max(model.ir_version, OLDEST_IR)


def _convert_opset(model: ir.Model) -> ir.Model:
    version = model.opset_imports.get("", OLDEST_OPSET)
    if version >= OLDEST_OPSET:
        return model
    with weights_aside(model) as weights:
        try:
            proto = version_converter.convert_version(ir.to_proto(model), OLDEST_OPSET)
        except Exception as error:  # the converter raises plain RuntimeErrors of many kinds
            if version >= COMPATIBLE_OPSET:
                model.opset_imports[""] = OLDEST_OPSET
                return model
            raise ModelError(
                f"opset {version} can't be converted to {OLDEST_OPSET}: {str(error).splitlines()[0]}; "
                "export the model again with a newer opset"
            ) from error
        return give_back(ir.from_proto(proto), weights)


def _fold_constants(model: ir.Model) -> None:
    """Computes what depends on initializers alone: the constant part of a graph is a model without inputs, run once."""
    nodes = _constant_nodes(model)
    if not nodes:
        return
    inside = set(nodes)
    wanted = [
        value for node in nodes for value in node.outputs if any(user not in inside for user in value.consumers())
    ]
    try:
        arrays = _evaluate(model, nodes, wanted)
    except ModelError:  # folding is a convenience: without it less may be prunable, nothing is wrong
        return
    for value, array in zip(wanted, arrays, strict=True):
        if array.nbytes <= max(MOST_FOLDED, weight_bytes(model)):
            value.replace_all_uses_with(add_initializer(model, f"{value.name}.folded", array))


def _constant_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes, in order, whose inputs are all constant; none that draw random numbers or make graph outputs."""
    known = {value for value in model.graph.initializers.values() if not value.is_graph_input()}
    found = []
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if (
            inputs
            and known.issuperset(inputs)
            and node.op_type not in NEVER_FOLDED
            and not any(value.is_graph_output() for value in node.outputs)
            and all(a.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        ):
            found.append(node)
            known.update(node.outputs)
    return found


def _evaluate(model: ir.Model, nodes: list[ir.Node], wanted: list[ir.Value]) -> list[Array]:
    """What these nodes, which need nothing but initializers, compute. Raises `ModelError` where they fail."""
    copies: dict[ir.Value, ir.Value] = {}
    twins = []
    for node in nodes:
        for value in node.inputs:
            if value is not None and value not in copies:
                copies[value] = ir.Value(name=value.name, const_value=value.const_value)
        inputs = [copies[value] if value is not None else None for value in node.inputs]
        attributes, count = node.attributes.values(), len(node.outputs)
        twin = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=count, name=node.name)
        for value, output in zip(node.outputs, twin.outputs, strict=True):
            output.name, copies[value] = value.name, output
        twins.append(twin)
    weights = [copy for copy in copies.values() if copy.producer() is None]
    graph = ir.Graph(
        [], [copies[value] for value in wanted], nodes=twins, initializers=weights, opset_imports=model.opset_imports,
        name="constant",
    )  # fmt: skip
    return run_model(ir.Model(graph, ir_version=model.ir_version), {})


def _unshare_initializers(model: ir.Model) -> None:
    """Gives every use of a vector its own copy: exporters store equal ones once, for unrelated layers.

    Matrices are shared on purpose (tied weights, unrolled loops) and stay so.
    """
    for value in list(model.graph.initializers.values()):
        if value.const_value is None or sum(dim > 1 for dim in value.const_value.shape.numpy()) > 1:
            continue
        for index, (node, position) in enumerate(list(value.uses())):
            if index and node.graph is model.graph:
                name = f"{value.name}.{index}"
                copy = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
                while copy.name in model.graph.initializers:
                    copy.name = f"{copy.name}x"
                model.graph.register_initializer(copy)
                node.replace_input_with(position, copy)


def _name_everything(model: ir.Model) -> None:
    common.NameFixPass()(model)
    taken = {node.name for node in model.graph}
    for index, node in enumerate(model.graph):
        if not node.name:
            name = f"{node.op_type}_{index}"
            node.name = name if name not in taken else f"{name}.{np.random.default_rng(index).integers(10**9)}"
