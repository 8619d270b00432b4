"""Data: every way to give it, and every way to get it wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxprune.data import ImageOptions, check_data, load_data
from onnxprune.errors import DataError
from onnxprune.model import open_model
from onnxprune.normalise import normalise
from tests.conftest import MODELS

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
    np.testing.assert_allclose(data.inputs["input"][[0, -1], 0, 0, 0], [-2, 2])
    (tmp_path / "white" / "2.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"2\.png"):
        load_data(str(tmp_path), MODEL)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        load_data(str(tmp_path), MODEL)


def test_holding_back_is_seeded_and_loses_nothing() -> None:
    data = check_data({"input": np.arange(6 * 64, dtype=np.float32).reshape(6, 1, 8, 8), "labels": LABELS}, MODEL)
    rest, held = data.split(0.3, seed=1)
    again, _ = data.split(0.3, seed=1)
    assert sorted([*rest.labels.tolist(), *held.labels.tolist()]) == LABELS.tolist()  # type: ignore[union-attr]
    assert len(held) == 2 and rest.digest() == again.digest() != data.digest()
