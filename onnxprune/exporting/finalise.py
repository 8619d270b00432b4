"""The form in which a pruned model is handed over: batch normalisation folded, copies of initializers shared again."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import cast

import onnx
import onnx_ir as ir
import onnxsim
from onnx_ir.passes import common

from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import comparable_form, relative_difference, run_model, tolerance
from onnxprune.graph.model import to_bytes

KEEP = [
    "fuse_matmul_add_bias_into_gemm",
    "fuse_matmul_add_bias_into_gemm_batched",
    "fuse_qkv",
    "fuse_attention",
    "fuse_gqa",
    "fuse_rope",
]


def finalise(model: ir.Model) -> ir.Model:
    """The model simplified for delivery, or as it is where that would change what it computes."""
    try:
        with native_output_hidden():
            proto, _ = onnxsim.simplify(onnx.load_from_string(to_bytes(model)), skipped_optimizers=KEEP)
        result = cast(ir.Model, ir.from_proto(proto))
        common.DeduplicateInitializersPass()(result)
        common.RemoveUnusedNodesPass()(result)
        inputs = random_inputs(model, seed=0)
        pairs = zip(run_model(comparable_form(model), inputs), run_model(comparable_form(result), inputs), strict=True)
        if all(relative_difference(a, b) <= tolerance(model) for a, b in pairs):
            return result
    except Exception:  # simplifying is a convenience; the cut model itself was checked
        return model
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
