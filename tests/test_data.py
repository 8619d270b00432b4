"""Data: every way to give it, and every way to get it wrong."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxprune.errors import DataError
from onnxprune.evaluating.data import check_data
from onnxprune.evaluating.metrics import find_metric
from onnxprune.evaluating.sources import ImageOptions, load_data
from onnxprune.graph.model import open_model
from onnxprune.normalising.normalise import normalise
from tests.conftest import MODELS
from tests.graphs import graph

MODEL = normalise(open_model(MODELS / "digits_resnet.onnx"))
GOOD = np.zeros((6, 1, 8, 8), np.float32)
LABELS = np.arange(6)


def nan() -> np.ndarray:
    array = GOOD.copy()
    array[2, 0, 1, 1] = np.nan
    return array


BAD = {
    "wrong name": ({"picture": GOOD}, "'input'"),
    "unknown extra": ({"input": GOOD, "weights": LABELS}, "'weights'"),
    "shape": ({"input": GOOD[:, :, :4]}, "shape"),
    "rank": ({"input": GOOD[:, 0]}, "shape"),
    "dtype": ({"input": GOOD.astype(np.float64)}, "float64"),
    "bytes": ({"input": GOOD.astype(np.uint8)}, "uint8"),
    "counts": ({"input": GOOD, "labels": LABELS[:4]}, "number of samples"),
    "no samples": ({"input": GOOD[:0], "labels": LABELS[:0]}, "no samples"),
    "nan": ({"input": nan()}, "NaN"),
    "label too large": ({"input": GOOD, "labels": LABELS + 5}, "0 to 9"),
    "negative label": ({"input": GOOD, "labels": LABELS - 1}, "'labels'"),
    "text labels": ({"input": GOOD, "labels": np.array(list("abcdef"))}, "'labels'"),
    "nan label": ({"input": GOOD, "labels": np.full(6, np.nan)}, "NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arrays_are_refused_by_name(name: str, tmp_path: Path) -> None:
    arrays, message = BAD[name]
    with pytest.raises(DataError, match=message):
        check_data(arrays, MODEL)
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path / "data.npz"), MODEL)


@pytest.mark.parametrize("name", ["input", "x", "images"])
def test_a_single_input_has_aliases(name: str) -> None:
    data = check_data({name: GOOD, "labels": LABELS}, MODEL)
    assert list(data.inputs) == ["input"] and len(data) == 6


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"data\.npz"):
        load_data(str(path), MODEL)
    np.save(tmp_path / "data.npy", GOOD)
    with pytest.raises(DataError, match="single array"):
        load_data(str(tmp_path / "data.npy"), MODEL)
    np.savez(tmp_path / "pickle.npz", input=np.array([{}], dtype=object))
    with pytest.raises(DataError):
        load_data(str(tmp_path / "pickle.npz"), MODEL)
    with pytest.raises(DataError, match="no such file"):
        load_data("missing.npz", MODEL)
    with pytest.raises(DataError, match="no such file"):
        load_data("missing", MODEL)


def test_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "feed.py").write_text(
        "import numpy as np\n"
        "def batches():\n"
        "    for i in range(3):\n"
        "        yield {'input': np.full((2, 1, 8, 8), i, np.float32), 'labels': np.array([i, i])}\n"
        "def broken():\n    raise RuntimeError('no disk')\n"
    )
    data = load_data("feed:batches", MODEL)
    assert len(data) == 6 and data.labels is not None and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for name, message in (("feed:nothing", "nothing"), ("nowhere:f", "nowhere"), ("feed:broken", "no disk")):
        with pytest.raises(DataError, match=message):
            load_data(name, MODEL)


def test_a_folder_of_images(tmp_path: Path) -> None:
    for label, shade in (("black", 0), ("white", 255)):
        (tmp_path / label).mkdir()
        for i in range(2):
            Image.new("RGB", (16, 16), (shade,) * 3).save(tmp_path / label / f"{i}.png")
    data = load_data(str(tmp_path), MODEL, ImageOptions(mean=(0.5,), std=(0.25,)))
    assert data.inputs["input"].shape == (4, 1, 8, 8)
    assert data.labels is not None and data.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(np.asarray(data.inputs["input"])[[0, -1], 0, 0, 0], [-2, 2])
    (tmp_path / "white" / "2.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"2\.png"):
        load_data(str(tmp_path), MODEL)


def test_several_files_are_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.standard_normal((7, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "a.npz", input=images[:4], labels=LABELS[:4])
    np.savez_compressed(tmp_path / "b.npz", input=images[4:], labels=np.array([4, 5, 6]))
    data = load_data([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")], MODEL)
    assert len(data) == 7 and data.labels is not None and data.labels.tolist() == [*LABELS[:4], 4, 5, 6]
    order = np.array([6, 0, 4, 3, 1])
    for taken, expected in (
        (data.take(slice(2, 6)), images[2:6]),
        (data.take(order), images[order]),
        (data.take(order).take(np.array([1, 2])), images[order][1:3]),
    ):
        np.testing.assert_array_equal(np.asarray(taken.inputs["input"]), expected)
    same = check_data({"input": images[order], "labels": np.array([6, 0, 4, 3, 1])}, MODEL)
    assert data.take(order).digest() == same.digest()
    np.savez(tmp_path / "c.npz", input=images.astype(np.float64), labels=np.arange(7))
    with pytest.raises(DataError, match=r"c\.npz: array 'input' is float64"):
        load_data([str(tmp_path / "a.npz"), str(tmp_path / "c.npz")], MODEL)


def test_what_lies_in_files_is_not_read_into_memory(tmp_path: Path) -> None:
    np.savez(tmp_path / "large.npz", input=np.zeros((200_000, 1, 8, 8), np.float32), labels=np.zeros(200_000, np.int64))
    tracemalloc.start()
    train, held = load_data(str(tmp_path / "large.npz"), MODEL).split(0.01, 0)
    train.digest()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(train) == 198_000 and len(held) == 2_000 and peak < 20e6  # of 51 MB


def test_a_damaged_file_is_noticed_though_it_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, input=GOOD, labels=LABELS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="can be read"):
        load_data(str(path), MODEL)


def test_labels_of_a_certain_value_do_not_count() -> None:
    labels = np.array([0, 255, 2, 255, 1, 3], np.uint8)
    with pytest.raises(DataError, match="--ignore-index"):
        check_data({"input": GOOD, "labels": labels}, MODEL)
    data = check_data({"input": GOOD, "labels": labels}, MODEL, ignored=255)
    assert data.labels is not None and data.labels.tolist() == [0, -1, 2, -1, 1, 3]
    scores = np.eye(10, dtype=np.float32)[[0, 0, 2, 0, 0, 0]]
    assert find_metric("top1", data).compute([scores], data.labels, []) == 50.0


def test_labels_of_further_outputs_are_checked_against_them() -> None:
    model = graph(
        "(float[N,6] x, float[6,4] w, float[6,3] v) => (float[N,4] y, float[N,3] z) "
        "{ y = MatMul(x, w) z = MatMul(x, v) }"
    )
    x = np.zeros((5, 6), np.float32)
    labels = {"labels.y": np.array([0, 0, 1, 1, 2]), "labels.z": np.full(5, 2), "labels.age": np.ones(5)}
    data = check_data({"x": x, **labels}, model)
    assert data.labels is not None and set(data.others) == {"z", "age"}
    with pytest.raises(DataError, match=r"'labels\.z' goes from 3 to 3, but the model's classes are 0 to 2"):
        check_data({"x": x, "labels.z": np.full(5, 3)}, model)
    with pytest.raises(DataError, match="number of samples"):
        check_data({"x": x, "labels.z": np.full(4, 2)}, model)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        load_data(str(tmp_path), MODEL)


def test_holding_back_is_seeded_and_loses_nothing() -> None:
    data = check_data({"input": np.arange(6 * 64, dtype=np.float32).reshape(6, 1, 8, 8), "labels": LABELS}, MODEL)
    rest, held = data.split(0.3, seed=1)
    again, _ = data.split(0.3, seed=1)
    assert sorted([*rest.labels.tolist(), *held.labels.tolist()]) == LABELS.tolist()  # type: ignore[union-attr]
    assert len(held) == 2 and rest.digest() == again.digest() != data.digest()
