"""The CUDA execution provider for real; skipped where this onnxruntime has none that can be loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnxprune.benchmarking.bench import Runtime, bench_models, fallen_back
from onnxprune.benchmarking.probe import probe
from onnxprune.errors import TrainingError, UsageError
from onnxprune.evaluating.data import random_inputs
from onnxprune.graph.model import is_loadable, open_model, open_session
from onnxprune.training import TrainingOptions, fine_tune
from tests.conftest import MODELS, call
from tests.test_training import damaged, digits, load

CUDA = "CUDAExecutionProvider"
NAMES = ("digits_resnet", "digits_vit", "digits_gru", "digits_mlp")


needs_cuda = pytest.mark.skipif(
    CUDA not in onnxruntime.get_available_providers() or not is_loadable(CUDA), reason="no CUDA execution provider here"
)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model at half of its MACs."""
    folder = tmp_path_factory.mktemp("cuda")
    paths = {name: folder / f"{name}.onnx" for name in NAMES}
    for name, path in paths.items():
        done = call("run", MODELS / f"{name}.onnx", "--target-macs", 0.5, "-o", path, cwd=folder)
        assert done.status == 0, done.err
    return paths


@needs_cuda
@pytest.mark.parametrize("name", NAMES)
def test_pruned_models_give_the_cpus_outputs(pruned: dict[str, Path], name: str) -> None:
    feeds = random_inputs(open_model(pruned[name]), 0, 4)
    exact = (CUDA, {"use_tf32": "0"})
    on_cpu, on_gpu = (
        open_session(str(pruned[name]), providers=[provider]).run(None, dict(feeds))
        for provider in ("CPUExecutionProvider", exact)
    )
    for a, b in zip(on_cpu, on_gpu, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@needs_cuda
def test_convolutions_run_on_the_gpu(pruned: dict[str, Path]) -> None:
    on_cpu, nodes = fallen_back(pruned["digits_resnet"], "cuda")
    assert on_cpu < nodes / 4


@needs_cuda
@pytest.mark.parametrize("bound", [False, True])
def test_models_are_timed_there(pruned: dict[str, Path], bound: bool) -> None:
    paths = [MODELS / "digits_resnet.onnx", pruned["digits_resnet"]]
    results = bench_models(paths, ["cuda"], seconds=1, runtime=Runtime(bound=bound))
    assert [result.provider for result in results] == [CUDA, CUDA]
    assert all(0 < result.against_first.low <= result.against_first.high for result in results)


@needs_cuda
def test_the_probe_times_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = probe(CUDA, None)
    assert found.provider == CUDA
    assert found.overhead > 100  # nanoseconds: a kernel has to be launched
    assert all(speed > 0 for speeds in found.speed.values() for speed in speeds)


@needs_cuda
@pytest.mark.parametrize("name", NAMES)
def test_training_there_lowers_the_loss_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    model, losses = load(name), []
    for trainer in ("graph", "cuda"):
        events = list[dict[str, Any]]()
        options = TrainingOptions(trainer, epochs=5, lr=1e-3, batch=32)  # type: ignore[arg-type]
        fine_tune(damaged(model), model, digits(model), tmp_path / trainer, options, progress=events.append)
        losses.append([event["loss"] for event in events if event["event"] == "step"])
    np.testing.assert_allclose(*losses, rtol=0.02, atol=0.01)  # its products are of TF32


@needs_cuda
def test_long_steps_are_taken_there(tmp_path: Path) -> None:
    def trained_by(batch: int) -> str:
        options = ("--target-macs", 0.5, "--epochs", 1, "--batch", batch, "--json")
        data = ("--data", MODELS / "digits.npz", "--eval-data", MODELS / "digits_test.npz")
        done = call("run", MODELS / "digits_resnet.onnx", *data, *options, "-o", tmp_path / "o.onnx", cwd=tmp_path)
        assert done.status == 0, done.err
        return str(json.loads(done.out)["rounds"][0]["trainer"])

    assert trained_by(512) == "cuda"
    assert trained_by(16) != "cuda"


def test_training_on_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("onnxprune.training.runtime.has_cuda", lambda: False)
    model = load("digits_mlp")
    with pytest.raises(TrainingError, match=f"no {CUDA}.*onnxruntime-gpu"):
        fine_tune(model, model, digits(model), tmp_path, TrainingOptions("cuda", epochs=1))


def test_a_provider_that_cannot_be_loaded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # as onnxruntime has it where the provider's library can't be loaded
    monkeypatch.setattr("onnxprune.graph.model.Session.get_providers", lambda session: ["CPUExecutionProvider"])
    other = next((name for name in onnxruntime.get_available_providers() if not name.startswith("CPU")), None)
    if other is None:
        pytest.skip("this onnxruntime has the CPU only")
    with pytest.raises(UsageError, match=f"{other}.*can't be loaded"):
        bench_models([MODELS / "digits_mlp.onnx"], [other], seconds=0.1)
