"""Data: what the user gives, checked against the model before any work, and random inputs where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.errors import ModelError
from onnxprune.shapes import dynamic_sizes, input_shape

Array = NDArray[Any]


def random_inputs(model: ir.Model, seed: int, batch: int | None = None) -> dict[str, Array]:
    """Signed random inputs for a model: normal for floats, small non-negative integers for the rest.

    Dynamic dimensions take the sizes of the first shape walk; `batch` replaces a dynamic first axis.
    Raises `ModelError` for an input that isn't a tensor with a known rank.
    """
    rng = np.random.default_rng(seed)
    sizes = dynamic_sizes(model, 0)
    inputs: dict[str, Array] = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if value.dtype is None or value.shape is None or not isinstance(value.type, ir.TensorType):
            raise ModelError(f"input {value.name!r} isn't a tensor of known rank; export the model with input shapes")
        shape = list(input_shape(value, sizes))
        if batch is not None and shape and not isinstance(value.shape[0], int):
            shape[0] = batch
        dtype = value.dtype.numpy()
        if value.dtype.is_floating_point():
            inputs[value.name or ""] = rng.standard_normal(shape).astype(dtype)
        elif dtype == np.bool_:
            inputs[value.name or ""] = rng.integers(0, 2, shape).astype(bool)
        else:
            inputs[value.name or ""] = rng.integers(0, 2, shape).astype(dtype)
    return inputs
