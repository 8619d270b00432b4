"""Fine-tuning on ONNX Runtime training, in a process of its own with a copy of the runtime of its own."""

from onnxprune.training.client import TrainingOptions, fine_tune, gradient_moments, minimise
from onnxprune.training.losses import Loss
from onnxprune.training.runtime import (
    Trainer,
    choose_trainer,
    find_runtime,
    install_runtime,
    prepare_trainer,
    supported,
)

__all__ = [
    "Loss",
    "Trainer",
    "TrainingOptions",
    "choose_trainer",
    "find_runtime",
    "fine_tune",
    "gradient_moments",
    "install_runtime",
    "minimise",
    "prepare_trainer",
    "supported",
]
