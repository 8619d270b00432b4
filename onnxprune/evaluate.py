"""Running models with onnxruntime, and measuring how good they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxruntime import InferenceSession, SessionOptions

from onnxprune.errors import ModelError
from onnxprune.model import open_session

Array = NDArray[Any]
Batch = Mapping[str, Array]


def run_model(model: ir.Model | bytes, inputs: Batch) -> list[Array]:
    """The outputs of one run. Raises `ModelError` when onnxruntime refuses or fails."""
    return run_session(open_session(model), inputs)


def run_session(session: InferenceSession, inputs: Batch) -> list[Array]:
    """The outputs of one run of an open session. Raises `ModelError` with the reason when it fails."""
    names = {value.name for value in session.get_inputs()}
    try:
        return list(session.run(None, {name: array for name, array in inputs.items() if name in names}))
    except Exception as error:
        raise ModelError(f"onnxruntime failed to run the model: {str(error).splitlines()[0]}") from error


def relative_difference(expected: Array, found: Array) -> float:
    """The largest difference over the largest magnitude expected; NaNs and infinities must agree in place."""
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
