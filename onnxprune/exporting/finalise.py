"""The form in which a pruned model is handed over: batch normalisation folded, copies of initializers shared again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import comparable_form, relative_difference, run_model, tolerance
from onnxprune.graph.model import to_bytes
from onnxprune.graph.shapes import add_initializer

KEEP = [
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_qkv",
    "fuse_attention",
    "fuse_gqa",
    "fuse_rope",
    "fuse_pad_into_conv",  # ONNX Runtime does that by itself, where it isn't kept from it (`PADS_APART`)
]
PADS_APART = "onnxprune.pads_apart"  # in a model's metadata: what finalise does about it


def finalise(model: ir.Model) -> ir.Model:
    """The model simplified for delivery, or as it is where that would change what it computes."""
    import onnxsim  # takes a second to load

    try:
        with native_output_hidden():
            proto, _ = onnxsim.simplify(onnx.load_from_string(to_bytes(model)), skipped_optimizers=KEEP)
        result = cast(ir.Model, ir.from_proto(proto))
        join_copies(result)
        inputs = random_inputs(model, seed=0)
        pairs = zip(run_model(comparable_form(model), inputs), run_model(comparable_form(result), inputs), strict=True)
        if all(relative_difference(a, b) <= tolerance(model) for a, b in pairs):
            return _with_pads_apart(result) if model.metadata_props.get(PADS_APART) else result
    except Exception:  # simplifying is a convenience; the cut model itself was checked
        return model
    return model


def join_copies(model: ir.Model) -> None:
    """Makes one of initializers and nodes that compute the same, in place."""
    common.DeduplicateInitializersPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def pads_before_convolutions(model: ir.Model) -> list[ir.Node]:
    """Pads of a known size before convolutions, which ONNX Runtime makes one operator of."""
    return [
        node
        for node in model.graph
        if node.op_type == "Pad"
        and node.inputs[1] is not None
        and node.inputs[1].is_initializer()
        and any(user.op_type == "Conv" for user in node.outputs[0].consumers())
    ]


def _with_pads_apart(model: ir.Model) -> ir.Model:
    """The same model, with pads that hang on a shape: ONNX Runtime then doesn't fuse them into convolutions.

    Long kernels that reach over an edge are slow there: a pitch tracker took twice as long. (A size times zero is
    added; any other constant expression is folded before.)
    """
    model.metadata_props.pop(PADS_APART, None)
    for node in pads_before_convolutions(model):
        zero = add_initializer(model, f"{node.name}.zero", np.zeros(1, np.int64))
        size = ir.node("Shape", [node.inputs[0]], {"start": 0, "end": 1}, name=f"{node.name}.size")
        nothing = ir.node("Mul", [size.outputs[0], zero], name=f"{node.name}.nothing")
        pads = ir.node("Add", [node.inputs[1], nothing.outputs[0]], name=f"{node.name}.pads")
        for each in (size, nothing, pads):
            each.outputs[0].name = f"{each.name}.value"
        model.graph.insert_before(node, [size, nothing, pads])
        node.replace_input_with(1, pads.outputs[0])
    return model


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
