"""Sensitivity: each group alone, the same figures wherever they are measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onnxprune.choosing.sensitivity import sensitivity
from onnxprune.errors import UsageError
from tests.conftest import MODELS, call

MODEL, DATA = MODELS / "digits_mlp.onnx", str(MODELS / "digits_test.npz")


def test_more_removed_costs_more_and_processes_change_nothing() -> None:
    one, two = (sensitivity(MODEL, DATA, ratios=(0.1, 0.9), samples=200, parallel=n) for n in ("1", "2"))
    assert one.curves and [c.group for c in one.curves] == [c.group for c in two.curves]
    for a, b in zip(one.curves, two.curves, strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-4)
        assert a.losses[1] > a.losses[0] >= one.loss - 0.02
        assert 0 < a.saved[0] < a.saved[1] < 1


def test_a_dask_cluster_measures_the_same() -> None:
    distributed = pytest.importorskip("distributed", reason="dask[distributed] isn't installed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        there = sensitivity(MODEL, DATA, samples=100, parallel=f"dask:{cluster.scheduler_address}")
    here = sensitivity(MODEL, DATA, samples=100)
    for a, b in zip(here.curves, there.curves, strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-4)


def test_a_ray_cluster_measures_the_same() -> None:
    pytest.importorskip("ray", reason="ray isn't installed")
    here, there = (sensitivity(MODEL, DATA, samples=100, parallel=where) for where in ("1", "ray:"))
    for a, b in zip(here.curves, there.curves, strict=True):
        np.testing.assert_allclose(a.losses, b.losses, rtol=1e-4)


def test_the_command_prints_writes_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib isn't installed")
    arguments = ("sensitivity", MODEL, "--data", DATA, "--samples", 100)
    shown = call(*arguments, "-o", "s.json", "--plot", "s.png", cwd=tmp_path)
    assert shown.status == 0, shown.err
    assert "lost" in shown.out and (tmp_path / "s.png").stat().st_size > 1000
    piped = call(*arguments, "--json", cwd=tmp_path)
    assert piped.json["curves"] == json.loads((tmp_path / "s.json").read_text())["curves"]


def test_a_run_takes_the_curves_as_its_prior(tmp_path: Path) -> None:
    assert call("sensitivity", MODEL, "--data", DATA, "--samples", 100, "-o", "s.json", cwd=tmp_path).status == 0
    run = ("run", MODEL, "--data", DATA, "--epochs", 0, "--target-macs", 0.3, "--json", "-o", "o.onnx")
    plain, weighed = (call(*run, *more, cwd=tmp_path) for more in ((), ("--prior", "s.json", "--overwrite")))
    assert plain.status == weighed.status == 0, weighed.err
    assert plain.json["rounds"][0]["widths"] != weighed.json["rounds"][0]["widths"]
    for wrong in ("none.json", MODEL):
        assert call(*run, "--prior", wrong, cwd=tmp_path).status == 2
    other = (run[0], MODELS / "digits_vit.onnx", *run[2:])
    assert call(*other, "--prior", "s.json", cwd=tmp_path).status == 2


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"parallel": "many"}, "processes"),
        ({"parallel": "0"}, "processes"),
        ({"parallel": "dask:tcp://127.0.0.1:9"}, "127.0.0.1"),
        ({"ratios": (0.5, 1.5)}, "between 0 and 1"),
        ({"samples": 0}, "1 or more"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        sensitivity(MODEL, DATA, **options)  # type: ignore[arg-type]
