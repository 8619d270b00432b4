"""Opening: hostile and broken files are refused with a reason, and nothing is ever written to the input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune.errors import ModelError
from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import run_model
from onnxprune.graph.model import open_model, save_model
from onnxprune.normalising.normalise import normalise
from tests.conftest import MODELS
from tests.graphs import graph, proto

LINEAR = "(float[N,6] x, float[6,8] w, float[8,5] v) => (float[N,5] y) { h = MatMul(x, w) y = MatMul(h, v) }"


def with_external(tmp_path: Path, location: str, size: int = 192, **extra: str) -> Path:
    model = proto(LINEAR)
    tensor = next(t for t in model.graph.initializer if t.name == "w")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(size), **extra}.items():
        tensor.external_data.add(key=key, value=value)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_model(path)
    return str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "missing.onnx")


def test_a_folder(tmp_path: Path) -> None:
    assert "not a file" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"\x00" * 100, b"PK\x03\x04zip"])
def test_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    assert "not an ONNX model" in refused(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, share: float) -> None:
    content = (MODELS / "digits_mlp.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(content[: int(len(content) * share)])
    assert str(path) in refused(path)


def test_external_data_missing(tmp_path: Path) -> None:
    assert "missing" in refused(with_external(tmp_path, "weights.bin"))


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd"])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 192)
    folder = tmp_path / "inner"
    folder.mkdir()
    assert "outside" in refused(with_external(folder, location))


def test_external_data_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(b"\0" * 192)
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "weights.bin").symlink_to(tmp_path / "secret.bin")
    assert "outside" in refused(with_external(folder, "weights.bin"))


def test_external_data_too_short(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 100)
    assert "bytes" in refused(with_external(tmp_path, "weights.bin"))


def test_external_data_with_unknown_keys(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 192)
    assert "unknown keys" in refused(with_external(tmp_path, "weights.bin", surprise="1"))


def test_external_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(np.arange(48, dtype=np.float32).tobytes())
    model = open_model(with_external(tmp_path, "weights.bin"))
    assert model.graph.initializers["w"].const_value is not None
    assert model.graph.initializers["w"].const_value.numpy()[0, 1] == 1


def test_sparse_initializers(tmp_path: Path) -> None:
    model = proto(LINEAR)
    values = numpy_helper.from_array(np.ones(2, np.float32), "s")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 3], np.int64), "i"), [6])
    model.graph.sparse_initializer.append(sparse)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert "sparse" in refused(path)


def test_saving_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    save_model(graph(LINEAR), path)
    onnx.checker.check_model(str(path), full_check=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.onnx"]


def test_weights_that_nothing_uses_do_no_harm(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [
            numpy_helper.from_array(np.ones(shape, np.float32), name)
            for name, shape in (("w", (6, 8)), ("v", (8, 5)), ("old", (300, 300)))
        ],
    )
    path = tmp_path / "unused.onnx"
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()
    )
    model = open_model(path)
    assert run_model(model, {"x": np.ones((2, 6), np.float32)})[0].shape == (2, 5)


@pytest.mark.parametrize("anything", ["?", "-", -1])
def test_sizes_that_mean_any_are_dynamic(anything: str | int, tmp_path: Path) -> None:
    """Paddle calls every dynamic size "?", or -1: they needn't be the same."""
    made = proto("(float[N, 4, H, W] x, float[6, 4, 1, 1] w) => (float[N, 6, H, W] y) { y = Conv(x, w) }")
    for value in (*made.graph.input, *made.graph.output):
        for axis in (0, 2, 3):
            dim = value.type.tensor_type.shape.dim[axis]
            if isinstance(anything, int):
                dim.dim_value = anything
            else:
                dim.dim_param = anything
    onnx.save(made, tmp_path / "model.onnx")
    inputs = random_inputs(normalise(open_model(tmp_path / "model.onnx")), 0, batch=None)
    assert len(set(inputs["x"].shape)) == 4
