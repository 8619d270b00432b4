"""Smaller numbers and other formats, by onnxruntime's own tools: the last stage before a device."""

from __future__ import annotations

import importlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import onnxruntime

from onnxprune.errors import ModelError, UsageError
from onnxprune.evaluating.data import Dataset, batches, fixed_batch
from onnxprune.exporting.finalise import finalise
from onnxprune.graph.files import replacing
from onnxprune.graph.model import open_model, save_model
from onnxprune.graph.threads import session_options

Numbers = Literal["int8", "dynamic", "fp16"]
NUMBERS: tuple[Numbers, ...] = ("int8", "dynamic", "fp16")
SAMPLES, BATCH = 256, 32  # that ranges are taken from
ORT = ".ort"


def quantise(model: Path, output: Path, numbers: Numbers, data: Dataset | None = None) -> None:
    """Writes a model with smaller numbers; inputs and outputs keep their types.

    `int8` is static: QuantizeLinear and DequantizeLinear around every operator, weights by channel, ranges of
    activations from up to 256 samples of `data`. `dynamic` keeps weights of matrix products as int8, and finds ranges
    when it runs: for transformers. `fp16` halves every number. Raises `UsageError` for int8 without data, `ModelError`
    where onnxruntime can't.
    """
    if numbers == "int8" and data is None:
        raise UsageError("--quantize int8 takes ranges from data: give --data, or use --quantize dynamic")
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    with tempfile.TemporaryDirectory() as folder:
        whole, place = Path(folder) / "whole.onnx", Path(folder) / "quantised.onnx"
        save_model(finalise(open_model(model)), whole)  # folded: what isn't an initializer isn't quantised
        try:
            if numbers == "fp16":
                _halve(whole, place)
            elif numbers == "dynamic":
                _quietly(
                    quantize_dynamic, str(whole), str(place), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
                    weight_type=QuantType.QInt8,
                )  # fmt: skip
            else:
                assert data is not None
                _quietly(
                    quantize_static, str(whole), str(place), _Reader(whole, data), quant_format=QuantFormat.QDQ,
                    per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                    calibration_providers=["CPUExecutionProvider"],
                )  # fmt: skip
            save_model(open_model(place), output)
        except Exception as error:  # its tools raise whatever comes
            raise ModelError(f"{model}: can't be made {numbers}: {str(error).splitlines()[0]}") from error


class _Reader:
    """Batches of the first samples, as onnxruntime's CalibrationDataReader gives them."""

    def __init__(self, model: Path, data: Dataset) -> None:
        size = fixed_batch(open_model(model)) or BATCH
        count = max(min(SAMPLES, len(data)) // size, 1) * size
        self._batches: Iterator[dict[str, Any]] = batches(data.take(slice(0, count)), size)

    def get_next(self) -> Any:
        """The next batch, or None."""
        return next(self._batches, None)


def _quietly(function: Any, *given: Any, **named: Any) -> None:
    """Without the advice that onnxruntime's tools log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        function(*given, **named)
    finally:
        logging.disable(before)


def _halve(model: Path, output: Path) -> None:
    convert: Any = importlib.import_module("onnxruntime.transformers.float16").convert_float_to_float16
    halved = ir.from_proto(convert(onnx.load(model), keep_io_types=True))
    halved.graph.sort()  # it puts the casts last
    save_model(halved, output)


def as_ort(model: Path, output: Path) -> None:
    """Writes a model in onnxruntime's own format (.ort), which its minimal builds read; optimised for any machine.

    Raises `ModelError` where onnxruntime can't.
    """
    options = session_options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model.ort"
        options.optimized_model_filepath = str(place)
        options.add_session_config_entry("session.save_model_format", "ORT")
        try:
            onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises many unrelated types
            raise ModelError(f"{model}: can't be written as .ort: {str(error).splitlines()[0]}") from error
        with replacing(output) as temporary:
            shutil.copy(place, temporary)
