"""Targets that are measured: what the machine likes, the estimate made of it, and the search that corrects it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import onnxprune
from onnxprune.benchmarking.latency import CORRECTIONS, correct
from onnxprune.benchmarking.probe import CPU, SPEED_WIDTHS, Probe, block_size, cache_file, probe
from onnxprune.choosing.select import Rounding
from onnxprune.errors import UsageError
from onnxprune.graph.files import write_json
from onnxprune.graph.model import open_model
from onnxprune.labels import analyse
from onnxprune.labels.units import find_units
from onnxprune.normalising.normalise import normalise
from onnxprune.running.options import RunOptions
from onnxprune.scoring.cost import Cost
from tests.conftest import MODELS, call
from tests.graphs import graph

SPEEDS = {"conv": 10.0, "pointwise": 20.0, "depthwise": 5.0, "matmul": 40.0}
SPEED = {kind: [speed] * len(SPEED_WIDTHS) for kind, speed in SPEEDS.items()}
STEPS = {"conv": 8, "pointwise": 8, "depthwise": 8, "matmul": 1}
TARGET = Probe("a machine", CPU, 1, "1.0", STEPS, SPEED, 4.0, 2.0, 100.0)


def test_the_block_is_what_the_runtime_pads_to() -> None:
    assert block_size() in (1, 4, 8, 16, 32, 64)


def test_a_probe_is_kept_and_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path))
    found = probe(threads=1)
    assert cache_file(CPU, 1).is_file() and probe(threads=1) == found
    assert found.steps["conv"] == block_size() and found.steps["matmul"] == 1
    assert all(speed > 0 for speeds in found.speed.values() for speed in speeds)
    cache_file(CPU, 1).write_text("{}")
    assert probe(threads=1).steps == found.steps  # measured anew


WIDE = """(float[1,3,8,8] x, float[40,3,{k},{k}] w, float[5,40,{k},{k}] v) => (float[1,5,8,8] y)
{{ h = Conv{p}(x, w) y = Conv{p}(h, v) }}"""


@pytest.mark.parametrize(
    ("kernel", "block", "wanted"),
    [
        (3, 16, {1: 4, 4: 4, 5: 8, 8: 8, 9: 16, 16: 16, 17: 32, 33: 40}),
        (3, 8, {1: 4, 5: 8, 9: 16, 17: 24, 33: 40}),
        (1, 16, {1: 16, 16: 16, 17: 32, 33: 40}),  # 1x1 convolutions are slower below a block
        (3, 1, {1: 1, 5: 5, 17: 17}),  # nothing is blocked
    ],
)
def test_widths_are_whole_blocks_and_below_one_what_the_kernels_like(
    kernel: int, block: int, wanted: dict[int, int]
) -> None:
    text = WIDE.format(k=kernel, p=f"<pads=[{', '.join(['1'] * 4)}]>" if kernel == 3 else "")
    (group,) = find_units(analyse(graph(text))).groups
    assert {kept: Rounding(None, block).up(group, kept) for kept in wanted} == wanted


def test_a_1x1_convolution_beside_a_wider_one_decides() -> None:
    mixed = WIDE.replace("float[5,40,{k},{k}] v", "float[5,40,1,1] v").format(k=3, p="<pads=[1, 1, 1, 1]>")
    mixed = mixed.replace("y = Conv<pads=[1, 1, 1, 1]>", "y = Conv")
    (group,) = find_units(analyse(graph(mixed))).groups
    assert Rounding(None, 16).up(group, 4) == 16


def test_what_feeds_matrix_products_alone_has_any_width() -> None:
    for group in find_units(analyse(normalise(open_model(MODELS / "digits_mlp.onnx")))).groups:
        assert Rounding(None, 16).up(group, 3) == 3


def test_speeds_between_the_probed_widths() -> None:
    target = replace(TARGET, speed={**SPEED, "conv": [1.0, 1.0, 2.0, 4.0, 4.0, 4.0]})
    for width, speed in ((2, 1.0), (8, 1.0), (11.3137, 2**0.5), (16, 2.0), (100, 4.0), (999, 4.0)):
        assert target.speed_at("conv", width) == pytest.approx(speed, rel=1e-4)


def test_the_estimate_counts_rounded_products_and_what_else_is_written() -> None:
    model = graph("(float[N,3,6,6] x, float[32,3,3,3] w, float[5,32,1,1] v) => (float[N,5,H,W] y) "
                  "{ h = Conv(x, w) s = Sigmoid(h) y = Conv(s, v) }")  # fmt: skip
    units = find_units(analyse(model))
    (group,) = units.groups
    for kept, counted in ((32, 32), (17, 24), (16, 16), (9, 16), (8, 8), (5, 5)):
        alive = np.ones(units.count, bool)
        alive[group.units[kept:]] = False
        expected = 300 + 16 * 27 * counted / 10 + 16 * kept / 2 + 16 * 5 * counted / 20 + (27 + 5) * counted / 4
        assert Cost(units, TARGET).nanoseconds(alive) == pytest.approx(expected, abs=1)
    assert Cost(units).nanoseconds(np.ones(units.count, bool)) == 0


def staircase(estimate: float) -> float:
    return 0.1 * np.floor(estimate * 10)


SHAPES: dict[str, tuple[Callable[[float], float], float, float]] = {  # measured by estimate; asked; what is found
    "as estimated": (lambda e: e, 0.5, 0.5),
    "slower than estimated": (lambda e: 0.3 + 0.7 * e, 0.5, 0.49),
    "faster than estimated": (lambda e: e**2, 0.5, 0.49),
    "in steps": (staircase, 0.55, 0.5),
    "out of reach": (lambda e: 0.8 + 0.1 * e, 0.5, 0.81),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_search_ends_at_the_slowest_cut_within_the_time(name: str) -> None:
    measured, asked, wanted = SHAPES[name]
    tried = []

    def cut_at(estimate: float) -> tuple[float, float]:
        tried.append(estimate)
        return estimate, float(measured(estimate))

    found = correct(asked, cut_at)
    assert found is not None and found[1] == pytest.approx(wanted, abs=0.03)
    assert len(tried) <= CORRECTIONS


def test_where_no_cut_is_fast_enough_for_the_estimate() -> None:
    assert correct(0.5, lambda estimate: None) is None


def test_an_estimate_that_is_far_off_is_corrected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where operators are thought to cost much however narrow they are, no cut seems to be fast enough."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(tmp_path))
    write_json(cache_file(CPU, 1), replace(probe(threads=1), overhead=1e6).to_json())
    way = {"criterion": "flap", "scope": "gradual"}
    options = RunOptions(target_latency=0.6, epochs=0, threads=1, layers=0, bench_seconds=0.2, **way)  # type: ignore[arg-type]
    report = onnxprune.run(MODELS / "digits_resnet.onnx", str(MODELS / "digits.npz"), output=tmp_path / "o.onnx",
                           options=options)  # fmt: skip
    assert report.rounds[0]["macs_share"] > 0.1 and not any("out of reach" in note for note in report.notes)


def test_a_target_latency_is_measured_and_reported(tmp_path: Path) -> None:
    result = call("run", MODELS / "digits_vit.onnx", "-o", "out.onnx", "--data", MODELS / "digits.npz", "--epochs", 0,
                  "--target-latency", 0.8, "--threads", 1, "--json", cwd=tmp_path)  # fmt: skip
    assert result.status in (0, 5)
    entry = result.json["target"]["resources"]["latency"]
    assert entry["asked"] == 0.8 and entry["reached"] == pytest.approx(1 / result.json["speedup"][CPU]["speedup"])
    assert (result.status == 0) == (entry["reached"] <= 0.8 * 1.05)
    assert any("with layers" in note for note in result.json["notes"])
    with pytest.raises(UsageError, match="target-latency"):
        RunOptions(target_latency=1.5)
