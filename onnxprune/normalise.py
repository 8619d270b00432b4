"""From any ordinary model to one form that the analysis reads: the same function, the same inputs and outputs.

Local functions are inlined, old opsets converted, initializers taken out of the inputs, constants lifted and folded,
shape arithmetic made constant, and initializers that several nodes share cloned. BatchNormalization stays as it is:
scoring, repair and fine-tuning want it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
import onnxsim
from onnx import helper, version_converter
from onnx_ir.passes import common

from onnxprune.data import random_inputs
from onnxprune.errors import ModelError
from onnxprune.evaluate import Array, relative_difference, run_model
from onnxprune.model import to_bytes
from onnxprune.shapes import add_initializer, simplify_shape_arithmetic

OLDEST_OPSET = 17  # LayerNormalization, and BatchNormalization as training knows it
OLDEST_IR = 8  # from 4 on, initializers needn't be inputs
TOLERANCE = 1e-4  # relative; folding constants rounds differently, nothing else should


def normalise(model: ir.Model) -> ir.Model:
    """The normalised form of a model, checked to compute the same on random inputs.

    Raises:
        ModelError: onnxruntime can't run the model, its opset can't be converted, or the normalised form computes
            something else (which would be a fault of this package).
    """
    inputs = random_inputs(model, seed=0)
    expected = run_model(model, inputs)
    model = model.clone()
    _clean(model)
    model = _convert_opset(model)
    _dequantize_weights(model)
    model = _fold_constants(model)
    _clean(model)
    simplify_shape_arithmetic(model)
    _clean(model)
    _unshare_initializers(model)
    _name_everything(model)
    found = run_model(model, inputs)
    worst = max((relative_difference(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)
    if not worst <= TOLERANCE:
        raise ModelError(f"normalising changed what the model computes (relative difference {worst:.1e}); not pruned")
    return model


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
    try:
        proto = version_converter.convert_version(ir.to_proto(model), OLDEST_OPSET)
    except Exception as error:  # the converter raises plain RuntimeErrors of many kinds
        if version >= 13:
            return model
        raise ModelError(
            f"opset {version} can't be converted to {OLDEST_OPSET}: {str(error).splitlines()[0]}; "
            "export the model again with a newer opset"
        ) from error
    return ir.from_proto(proto)


def _dequantize_weights(model: ir.Model) -> None:
    """Weights stored as integers in a model that computes in floats become floats; a quantised model stays as it is."""
    nodes = list(model.graph)
    if any(node.op_type == "QuantizeLinear" for node in nodes):
        return
    for node in nodes:
        if node.op_type == "DequantizeLinear" and all(v is None or v.is_initializer() for v in node.inputs):
            result = _evaluate(model, node)
            node.outputs[0].replace_all_uses_with(add_initializer(model, f"{node.outputs[0].name}.float", result))


def _evaluate(model: ir.Model, node: ir.Node) -> Array:
    """What a node with constant inputs computes."""
    initializers = [ir.to_proto(value.const_value) for value in node.inputs if value is not None and value.const_value]
    outputs = [helper.make_value_info(node.outputs[0].name or "", onnx.TypeProto())]
    graph = helper.make_graph([ir.to_proto(node)], "constant", [], outputs, initializers)
    opsets = [helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
    return run_model(proto.SerializeToString(), {})[0]


def _fold_constants(model: ir.Model) -> ir.Model:
    proto = onnx.load_from_string(to_bytes(model))
    try:
        with native_output_hidden():
            folded, _ = onnxsim.simplify(proto, perform_optimization=False, skipped_optimizers=["fuse_bn_into_conv"])
    except Exception:  # folding is a convenience: without it less may be prunable, nothing is wrong
        return model
    return cast(ir.Model, ir.from_proto(folded))


@contextlib.contextmanager
def native_output_hidden() -> Iterator[None]:
    """Hides what native code prints: onnxsim's C++ side prints warnings by the thousand on file descriptors 1 and 2."""
    saved = [(fd, os.dup(fd)) for fd in (1, 2)]
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        for fd, _ in saved:
            os.dup2(sink, fd)
        yield
    finally:
        for fd, copy in saved:
            os.dup2(copy, fd)
            os.close(copy)
        os.close(sink)


def _unshare_initializers(model: ir.Model) -> None:
    """Gives every use of an initializer its own copy: two consumers may need different channels of it."""
    for value in list(model.graph.initializers.values()):
        for index, (node, position) in enumerate(list(value.uses())):
            if index and node.graph is model.graph and value.const_value is not None:
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
