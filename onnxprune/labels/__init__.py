"""Channel labels: which positions along which axes of which tensors must live and die together."""

from onnxprune.labels import (
    attention,
    convolution,
    linear,
    normalization,
    pointwise,
    quantization,
    recurrent,
    reshaping,
    selection,
)
from onnxprune.labels.flow import Flow, Lock, Vector
from onnxprune.labels.solve import Solution, analyse

__all__ = [
    "Flow",
    "Lock",
    "Solution",
    "Vector",
    "analyse",
    "attention",
    "convolution",
    "linear",
    "normalization",
    "pointwise",
    "quantization",
    "recurrent",
    "reshaping",
    "selection",
]
