"""Smaller numbers and other formats: they run, say nearly the same, and are smaller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from onnxprune.evaluating.sources import load_data
from onnxprune.graph.model import open_model
from tests.conftest import MODELS, call


def accuracy(path: Path) -> float:
    data = load_data(str(MODELS / "digits_test.npz"), open_model(MODELS / "digits_resnet.onnx")).take(slice(None))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name, array), *_ = data.inputs.items()
    scores = session.run(None, {session.get_inputs()[0].name: array})[0]
    return float((np.asarray(scores).argmax(1) == data.labels).mean()) if name else 0.0


SMALLER = [
    *(("int8", 0.55, "digits_resnet"), ("fp16", 0.6, "digits_resnet")),
    *(("dynamic", 0.4, "digits_mlp"), ("dynamic", 0.5, "digits_vit")),
]


@pytest.mark.parametrize(("numbers", "size", "model"), SMALLER)
def test_smaller_numbers(numbers: str, size: float, model: str, tmp_path: Path) -> None:
    source = MODELS / f"{model}.onnx"
    result = call("export", source, "-o", "out.onnx", "--quantize", numbers, "--data", MODELS / "digits.npz", "--json",
                  cwd=tmp_path)  # fmt: skip
    assert result.status == 0 and result.json["size_bytes"]["after"] < size * result.json["size_bytes"]["before"]
    assert accuracy(tmp_path / "out.onnx") > accuracy(source) - 0.02


def test_the_format_of_minimal_builds(tmp_path: Path) -> None:
    assert call("export", MODELS / "digits_gru.onnx", "-o", "out.ort", cwd=tmp_path).status == 0
    assert (tmp_path / "out.ort").read_bytes()[4:8] == b"ORTM"
    assert accuracy(tmp_path / "out.ort") == accuracy(MODELS / "digits_gru.onnx")


def test_int8_wants_data_and_leaves_nothing_without(tmp_path: Path) -> None:
    result = call("export", MODELS / "digits_mlp.onnx", "-o", "out.onnx", "--quantize", "int8", cwd=tmp_path)
    assert result.status == 2 and "--data" in result.err and not (tmp_path / "out.onnx").exists()


def test_a_run_that_ends_with_smaller_numbers(tmp_path: Path) -> None:
    given = ("--data", MODELS / "digits.npz", "--eval-data", MODELS / "digits_test.npz", "--epochs", 0, "--json")
    words = ("--target-macs", 0.5, "--quantize", "int8")
    result = call("run", MODELS / "digits_resnet.onnx", "-o", "out.onnx", *words, *given, cwd=tmp_path)
    assert result.status == (5 if result.json["target"]["slower"] else 0), result.err  # int8 may be, on this machine
    assert result.json["pruned"]["size_bytes"] < 0.5 * result.json["baseline"]["size_bytes"]
    assert result.json["pruned"]["metric"]["value"] == pytest.approx(100 * accuracy(tmp_path / "out.onnx"), abs=0.2)
    assert "QuantizeLinear" in {node.op_type for node in open_model(tmp_path / "out.onnx").graph}


def test_smaller_numbers_that_cost_too_much_are_not_delivered(tmp_path: Path) -> None:
    given = ("--data", MODELS / "digits.npz", "--eval-data", MODELS / "digits_test.npz", "--epochs", 0, "--json")
    words = ("--target-macs", 0.9, "--max-drop", 0, "--metric", "kl", "--quantize", "int8", "--rounds", 1)
    result = call("run", MODELS / "digits_mlp.onnx", "-o", "out.onnx", *words, *given, cwd=tmp_path)
    assert result.status == 5 and any("int8 numbers" in note for note in result.json["notes"])
    assert "QuantizeLinear" not in {node.op_type for node in open_model(tmp_path / "out.onnx").graph}
