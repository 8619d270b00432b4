"""The check of a cut has three outcomes, and text is text wherever it comes from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import onnxprune
from onnxprune.cli.output import plain
from onnxprune.graph.model import open_model, save_model
from tests.conftest import MODELS, call
from tests.graphs import graph

NORMALISED = """(float[N,3,8,8] x, float[16,3,3,3] w, float[5,16,1,1] v) => (float[N,5,6,6] y)
{ h = Conv(x, w) n = LRN<size=3>(h) y = Conv(n, v) }"""
PLAIN = """(float[N,8] x, float[8,32] w, float[32,4] v) => (float[N,4] y)
{ h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"""
PARTIAL = (
    "(float[N,6] x, float[6,16] w, float[16,5] v) => (float[N,5] y) {{ h = MatMul(x, w) l = {}(h) y = MatMul(l, v) }}"
)


def cut(model: ir.Model, folder: Path) -> onnxprune.PruneResult:
    save_model(model, folder / "m.onnx")
    return onnxprune.prune(
        folder / "m.onnx", folder / "p.onnx", 0.5, plan=folder / "plan.json", baseline=folder / "b.onnx"
    )


def spoil(path: Path, factor: float) -> None:
    model = open_model(path)
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy()  # type: ignore[union-attr]
        if array.dtype.kind == "f":
            noise = np.random.default_rng(0).standard_normal(array.shape).astype(array.dtype)
            value.const_value = ir.tensor(factor * noise, name=name)
    save_model(model, path.with_name("bad.onnx"))


def verified(folder: Path, name: str) -> onnxprune.Verification:
    return onnxprune.verify(folder / "b.onnx", folder / name, folder / "plan.json")


def test_what_a_mask_says_nothing_of_is_not_comparable(tmp_path: Path) -> None:
    result = cut(graph(NORMALISED), tmp_path)
    assert result.check == "not comparable" and "mixes" in result.why
    assert (verified(tmp_path, "p.onnx").outcome, verified(tmp_path, "p.onnx").exit_status) == ("not comparable", 9)
    spoil(tmp_path / "p.onnx", 1e6)
    assert (verified(tmp_path, "bad.onnx").outcome, verified(tmp_path, "bad.onnx").exit_status) == ("different", 8)


def test_another_shape_is_different_whatever_the_plan_says(tmp_path: Path) -> None:
    cut(graph(NORMALISED), tmp_path)
    other = graph("(float[N,3,8,8] x, float[8,3,3,3] w, float[5,8,1,1] v) => (float[N,5,3,3] y)"
                  " { h = Conv(x, w) n = LRN<size=3>(h) y = Conv<strides=[2,2]>(n, v) }")  # fmt: skip
    save_model(other, tmp_path / "shape.onnx")
    assert verified(tmp_path, "shape.onnx").outcome == "different"


@pytest.mark.parametrize("function", ["Log", "Sqrt", "Acosh", "Asin", "Reciprocal", "Relu"])
def test_functions_of_half_of_the_numbers_are_compared_all_the_same(function: str, tmp_path: Path) -> None:
    result = cut(graph(PARTIAL.format(function)), tmp_path)
    assert result.check == "equal", result.why
    assert verified(tmp_path, "p.onnx").outcome == "equal"
    spoil(tmp_path / "p.onnx", 99)
    assert verified(tmp_path, "bad.onnx").outcome == "different"


def test_the_command_line_says_which(tmp_path: Path) -> None:
    save_model(graph(NORMALISED), tmp_path / "m.onnx")
    made = call(
        "prune", "m.onnx", "-o", "p.onnx", "--ratio", 0.5, "--plan", "p.json", "--baseline", "b.onnx", cwd=tmp_path
    )
    assert made.status == 0 and "not comparable" in made.err
    found = call("verify", "b.onnx", "p.onnx", "p.json", "--json", cwd=tmp_path)
    assert found.status == 9 and found.json["outcome"] == "not comparable" and not found.json["passed"]


# ---- text


def test_names_are_never_markup_or_control(tmp_path: Path) -> None:
    model = graph(PLAIN)
    for node in model.graph:
        node.name = f"{node.outputs[0].name}[/end]:train:\x1b[2J"
    model.graph.initializers["w"].name = "w[red]:rocket:"
    save_model(model, tmp_path / "m.onnx")
    seen = call("inspect", "m.onnx", cwd=tmp_path)
    assert seen.status == 0 and "w[red]:rocket:" in seen.out and "\x1b" not in seen.out
    (tmp_path / "data.py").write_text("def train():\n    raise ValueError('broken [loader]')\n")
    refused = call("run", "m.onnx", "--data", "data:train", cwd=tmp_path)
    assert refused.status == 4 and "data:train" in refused.err and "[loader]" in refused.err


@pytest.mark.parametrize(
    ("text", "shown"), [("a\x1b[31mb", "a\\x1b[31mb"), ("x\u202ey", "x\\u202ey"), ("ü ∑ 文\n", "ü ∑ 文\n")]
)
def test_control_characters_are_spelt_out(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_stdout_is_one_json_object_whatever_user_code_prints(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\ndef metric(outputs, labels):\n    print('hello'); os.system('echo from a child')\n"
        "    return 100 * float((outputs[0].argmax(-1) == labels).mean())\n"
    )
    asked = ("--data", MODELS / "digits_test.npz", "--metric", "mine:metric", "--target-macs", 0.7, "--epochs", 0)
    done = call("run", MODELS / "digits_mlp.onnx", *asked, "-o", "o.onnx", "--json", cwd=tmp_path)
    assert json.loads(done.out)["exit_status"] == done.status == 0
    assert "hello" in done.err and "from a child" in done.err
    wrong = call("run", "--nonsense", "--json", cwd=tmp_path)
    assert wrong.status == 2 and wrong.json["exit_status"] == 2 and "--nonsense" in wrong.json["error"]


def test_help_goes_to_stdout(tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "onnxprune", "run", "--help"], capture_output=True, text=True, check=True
    )
    assert "--max-drop" in shown.stdout and not shown.stderr


def test_masks_are_no_weights() -> None:
    """A table with minus infinity in it scores by its other numbers."""
    from onnxprune.labels.units import prunable
    from onnxprune.scoring.score import score_units

    model = graph(PLAIN)
    units = prunable(model, "m")
    before = score_units(units)
    for never in (-np.inf, np.nan, np.finfo(np.float32).min):
        array = model.graph.initializers["w"].const_value.numpy().copy()  # type: ignore[union-attr]
        array[0] = never
        masked = model.clone()
        masked.graph.initializers["w"].const_value = ir.tensor(array, name="w")
        found = score_units(prunable(masked, "m"))
        group = units.groups[0].units
        assert np.isfinite(found[group]).all() and np.corrcoef(before[group], found[group])[0, 1] > 0.8
