"""Folders of images: what counts as classes, how they are cropped, and the preparations that a model wants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from onnxprune.errors import DataError, UsageError
from onnxprune.evaluating.preparations import clearly_better, tried_on_folder
from onnxprune.evaluating.sources import ImageFolder, ImageOptions, load_data
from onnxprune.graph.model import save_model
from tests.conftest import call
from tests.graphs import graph

RNG = np.random.default_rng(0)


def folder_of(path: Path, classes: list[str], count: int = 30) -> None:
    """Images whose brightness says the class: dark, middle and bright in turn."""
    for index, name in enumerate(classes):
        (path / name).mkdir(parents=True)
        for k in range(count):
            pixels = np.clip(40 + 80 * index + RNG.integers(-20, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path / name / f"{k}.png")


def brightness(scale: float, shift: float) -> ir.Model:
    """Three classes by brightness of 40, 120 and 200, for pixels p that are given as p * scale + shift."""
    model = graph("(float[N,3,8,8] x, float[3,3] w, float[3] b) => (float[N,3] y)"
                  " { p = GlobalAveragePool(x) f = Flatten(p) h = MatMul(f, w) y = Add(h, b) }")  # fmt: skip
    centres = np.array([40.0, 120.0, 200.0])  # -(p - c)^2 is 2 c p - c^2 and what is the same for all
    w = np.tile(2 * centres / scale / 3, (3, 1))
    b = -(centres**2) - 2 * centres * shift / scale
    model.graph.initializers["w"].const_value = ir.tensor((w / 1e3).astype(np.float32), name="w")
    model.graph.initializers["b"].const_value = ir.tensor((b / 1e3).astype(np.float32), name="b")
    return model


@pytest.mark.parametrize(
    ("scale", "shift", "named"), [(1.0, 0.0, "0 to 255"), (2 / 255, -1.0, "ImageNet"), (1 / 255, 0.0, "")]
)
def test_the_preparation_that_a_model_wants_is_found(scale: float, shift: float, named: str, tmp_path: Path) -> None:
    folder_of(tmp_path / "d", ["a", "b", "c"])
    tried = tried_on_folder(tmp_path / "d", brightness(scale, shift), ImageOptions(), 1)
    better = clearly_better(tried, 90)
    if not named:
        assert better is None and tried[0].right == 1
    else:
        assert better is not None and named in better.what and better.right > 0.95 > tried[0].right


def test_the_size_that_a_model_wants_is_found(tmp_path: Path) -> None:
    """Where its input leaves the size open: this one adds up the pixels of 32 by 32 images."""
    folder_of(tmp_path / "d", ["a", "b", "c"])
    text = """(float[N,3,H,W] x, float[3,3] w, float[3] b) => (float[N,3] y)
    <int64[2] axes = {2, 3}, float k = {1024.0}>
    { s = ReduceSum<keepdims=0>(x, axes) f = Div(s, k) h = MatMul(f, w) y = Add(h, b) }"""
    model, fixed = graph(text), brightness(1 / 255, 0.0)
    for name in ("w", "b"):
        model.graph.initializers[name].const_value = fixed.graph.initializers[name].const_value
    tried = tried_on_folder(tmp_path / "d", model, ImageOptions(size=(16, 16)), 1)
    better = clearly_better(tried, 90)
    assert better is not None and better.options == "--size 32 32" and better.right > 0.95 > tried[0].right


def test_classes_in_the_order_of_their_numbers_are_found(tmp_path: Path) -> None:
    folder_of(tmp_path / "d", ["2", "10", "0"])  # by names: 0, 10, 2
    model = brightness(1 / 255, 0.0)
    labels = load_data(str(tmp_path / "d"), model).labels
    assert labels is not None and sorted(set(labels.tolist())) == [0, 1, 2]
    folder_of(tmp_path / "e", ["cat", "dog"])
    found = ImageFolder.of(tmp_path / "e", model, ImageOptions())
    with pytest.raises(UsageError, match="--label-order numbers"):
        found.labels(ImageOptions(label_order="numbers"))


def test_the_command_line_refuses_chance_and_names_the_preparation(tmp_path: Path) -> None:
    folder_of(tmp_path / "d", ["a", "b", "c"])
    save_model(brightness(1 / 255, 0.0), tmp_path / "m.onnx")
    wrong = call("run", "m.onnx", "--data", "d", "--mean", "120", "--std", "58", "-o", "o.onnx", cwd=tmp_path)
    assert wrong.status in (3, 4), wrong.err
    if wrong.status == 4:
        assert "no better than guessing" in wrong.err and "right in" in wrong.err
    assert not (tmp_path / "o.onnx").exists() and not (tmp_path / "o.onnxprune").exists()


@pytest.mark.parametrize("layout", ["flat", "one", "hidden"])
def test_images_without_classes_are_unlabelled(layout: str, tmp_path: Path) -> None:
    folder = tmp_path / "d" / ("" if layout == "flat" else "all")
    folder_of(folder.parent if folder.name != "d" else tmp_path, [folder.name if layout != "flat" else "d"])
    if layout == "hidden":
        folder_of(tmp_path / "d", [".cache"])
        (tmp_path / "d" / "empty").mkdir()
    data = load_data(str(tmp_path / "d"), brightness(1, 0))
    assert data.labels is None and len(data) == 30


def test_images_beside_classes_are_refused(tmp_path: Path) -> None:
    folder_of(tmp_path / "d", ["a", "b"], 3)
    Image.new("RGB", (8, 8)).save(tmp_path / "d" / "stray.png")
    with pytest.raises(DataError, match="Part them"):
        load_data(str(tmp_path / "d"), brightness(1, 0))


def test_the_middle_is_cut_out(tmp_path: Path) -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    (tmp_path / "d").mkdir()
    Image.fromarray(wide).save(tmp_path / "d" / "x.png")
    model = brightness(1, 0)
    squeezed = load_data(str(tmp_path / "d"), model).inputs["x"][:]
    middle = load_data(str(tmp_path / "d"), model, ImageOptions(crop=1.0)).inputs["x"][:]
    assert squeezed.shape == middle.shape == (1, 3, 8, 8)
    assert middle.mean() > 1.5 * squeezed.mean()  # half of the width is white in the square in the middle
    with pytest.raises(UsageError, match="--crop"):
        ImageOptions(crop=1.5)


def test_channels_may_be_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "d" / "red.png")
    model = brightness(1, 0)
    rgb, bgr = (load_data(str(tmp_path / "d"), model, ImageOptions(channels=c)).inputs["x"][:] for c in ("rgb", "bgr"))
    assert rgb[0, :, 0, 0].tolist() == [1, 0, 0] and bgr[0, :, 0, 0].tolist() == [0, 0, 1]
