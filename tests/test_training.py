"""Fine-tuning: the training graph computes what the model does, learns, resumes to the bit, and fails politely."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxprune.cutting.cut import cut
from onnxprune.errors import DataError, TrainingError, UsageError
from onnxprune.evaluating.data import Dataset, check_data, random_inputs
from onnxprune.evaluating.evaluate import predict, relative_difference, run_model
from onnxprune.evaluating.judge import Judge
from onnxprune.evaluating.metrics import find_metric, log_probabilities
from onnxprune.evaluating.sources import load_data
from onnxprune.graph.model import open_model
from onnxprune.labels import analyse
from onnxprune.labels.units import fading_parts, find_units
from onnxprune.normalising.normalise import normalise
from onnxprune.training import Loss, Trainer, TrainingOptions, fine_tune, runtime
from onnxprune.training.batches import augment
from onnxprune.training.client import WorkerDiedError, choose_augmentation
from onnxprune.training.forward import teacher_graph, trainable, training_graph, untrainable
from onnxprune.training.losses import plan_loss, with_features
from onnxprune.training.optimizer import AdamW, learning_rate
from tests.conftest import MODELS, needs_training
from tests.graphs import graph, random_cut

NAMES = ["digits_resnet", "digits_mlp", "digits_vit", "digits_gru"]


def load(name: str) -> ir.Model:
    return normalise(open_model(MODELS / f"{name}.onnx"))


def digits(model: ir.Model, count: int = 256) -> Dataset:
    return load_data(str(MODELS / "digits.npz"), model).take(slice(0, count))


def damaged(model: ir.Model) -> ir.Model:
    """The model with noise on its weights: something to win back."""
    result, rng = model.clone(), np.random.default_rng(0)
    for name in trainable(result):
        value = result.graph.initializers[name]
        array = value.const_value.numpy()  # type: ignore[union-attr]
        if array.ndim > 1:
            noise = 0.5 * array.std() * rng.standard_normal(array.shape)
            value.const_value = ir.tensor((array + noise).astype(np.float32), name=name)
    return result


def cross_entropy(model: ir.Model, data: Dataset) -> float:
    assert data.labels is not None
    rows = log_probabilities(predict(model, data)[0].astype(np.float64))
    return float(-rows[np.arange(len(rows)), data.labels].mean())


def loss_of(model: ir.Model, teacher: ir.Model, data: Dataset) -> float:
    a, b = (predict(m, data)[0] for m in (model, teacher))
    return float(np.mean((a - b) ** 2) / np.mean(b**2))


def numbers(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: model.graph.initializers[name].const_value.numpy() for name in trainable(model)}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["digits_mlp", "digits_gru", "digits_vit"])
def test_the_training_graph_of_a_model_computes_the_same(name: str) -> None:
    model = load(name)
    data = digits(model, 16)
    plan = plan_loss(model, data)
    expected = predict(model, data)[0]
    feeds = {**data.inputs, "onnxprune.labels": data.labels, "onnxprune.teacher.0": expected}
    loss, found = run_model(
        training_graph(model, plan, {name: array.shape for name, array in feeds.items()})[0], feeds
    )[:2]
    assert relative_difference(expected, found) < 1e-5
    scores = expected - expected.max(1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    assert float(loss) == pytest.approx(0.5 * -log_p[np.arange(16), data.labels].mean(), rel=1e-4)  # type: ignore[index]
    assert relative_difference(expected, run_model(teacher_graph(model, plan), data.inputs)[0]) == 0


def test_adamw_follows_its_algorithm() -> None:
    w, g = np.array([[1.0, -2.0]], np.float32), np.array([[0.5, 0.1]], np.float32)
    optimizer = AdamW({"w": w}, decay=0.1, relative=False)
    m = v = np.zeros((1, 2))
    expected = w.astype(np.float64).copy()
    for t in range(1, 4):
        optimizer.step({"w": g}, 0.01)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    np.testing.assert_allclose(w, expected, rtol=1e-5)


def test_relative_steps_dont_hang_on_the_scale_of_a_matrix() -> None:
    """A network whose inputs are a hundred times larger, and its first matrix so much smaller, trains the same."""
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((3, 4)).astype(np.float32), np.zeros(4, np.float32)
    small = {"w": w * np.float32(0.01), "b": b.copy()}
    large = {"w": w.copy(), "b": b.copy()}
    optimizers = [AdamW(weights, decay=0.1) for weights in (small, large)]
    for _ in range(5):
        g, h = rng.standard_normal((3, 4)).astype(np.float32), rng.standard_normal(4).astype(np.float32)
        for optimizer, gradient in zip(optimizers, (g * 100, g), strict=True):
            optimizer.step({"w": gradient, "b": h}, 0.01)
    np.testing.assert_allclose(100 * small["w"], large["w"], rtol=1e-4)
    np.testing.assert_allclose(small["b"], large["b"], rtol=1e-6)
    assert np.abs(large["w"] - w).max() > 0.1
    zero = {"w": np.zeros((3, 4), np.float32)}
    AdamW(zero, decay=0.1).step({"w": g}, 0.01)
    assert np.abs(zero["w"]).min() > 0


@needs_training
def test_the_rate_falls_with_the_number_of_matrices_unless_given(tmp_path: Path) -> None:
    model = normalise(open_model(MODELS / "digits_mlp.onnx"))
    data = load_data(str(MODELS / "digits.npz"), model).take(slice(0, 64))
    matrices = sum(len(v.shape or ()) > 1 for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT)
    for given, rate in ((None, 0.0075 / matrices**0.5), (0.02, 0.02)):
        folder = tmp_path / str(given)
        fine_tune(model.clone(), model, data, folder, TrainingOptions(epochs=1, lr=given, threads=1))
        assert json.loads((folder / "job.json").read_text())["lr"] == pytest.approx(rate)


def test_the_schedule_warms_up_and_falls() -> None:
    rates = [learning_rate(step / 100, 1.0) for step in range(100)]
    assert 0 < rates[0] < 0.11 and max(rates) == 1.0 == rates[5] and rates[-1] < 0.02
    assert all(a <= b for a, b in itertools.pairwise(rates[:5]))
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_augmentation_mirrors_and_moves_but_keeps_pixels(layout: str) -> None:
    image = np.arange(1, 26, dtype=np.float32).reshape(1, 1, 5, 5)
    batch = np.repeat(image, 256, 0) if layout == "nchw" else np.repeat(image, 256, 0).transpose(0, 2, 3, 1)
    changed = augment(batch, True, 1, layout, np.random.default_rng(0))
    assert changed.shape == batch.shape
    plain = changed if layout == "nchw" else changed.transpose(0, 3, 1, 2)
    kinds = set()
    for sample in plain[:, 0]:
        down, right = (int(x[0]) - 2 for x in np.where(sample == 13))
        mirrored = sample[2 + down, 2 + right - 1] == 14 if right > -2 else sample[2 + down, 2 + right + 1] == 12
        kinds.add((bool(mirrored), down, right))
    assert len(kinds) == 18


def test_digits_are_shifted_but_not_mirrored() -> None:
    model = load("digits_resnet")
    chosen = choose_augmentation(model, digits(model, 512), 1)
    assert chosen == {"flip": False, "shift": 1, "layout": "nchw"}


@needs_training
@pytest.mark.parametrize("name", NAMES)
def test_distillation_without_labels_wins_back_what_noise_took(name: str, tmp_path: Path) -> None:
    model = load(name)
    data = Dataset(digits(model).inputs, None)
    student = damaged(model)
    before = loss_of(student, model, data)
    events: list[dict[str, Any]] = []
    fine_tune(student, model, data, tmp_path / "job", TrainingOptions(epochs=8), progress=events.append)
    from onnxprune.repairing.repair import reestimate_batch_norm

    reestimate_batch_norm(student, data)
    assert loss_of(student, model, data) < 0.6 * before
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, steps[-1]["total"] + 1)) and len(steps) % 8 == 0


@needs_training
def test_labels_are_learnt(tmp_path: Path) -> None:
    model = load("digits_mlp")
    data, student, events = digits(model), damaged(model), list[dict[str, Any]]()
    options = TrainingOptions(epochs=10, loss=Loss(distillation=0.0))
    fine_tune(student, model, data, tmp_path / "job", options, progress=events.append)
    steps = [event for event in events if event["event"] == "step"]
    assert np.mean([e["loss"] for e in steps[-4:]]) < 0.7 * np.mean([e["loss"] for e in steps[:4]])
    assert steps[-1]["accuracy"] >= 0.9


@needs_training
def test_results_are_equal_to_the_bit_whatever_the_threads_and_after_a_kill(tmp_path: Path) -> None:
    model = load("digits_resnet")
    data = digits(model)
    results = []
    for name, threads, kill in (("a", 1, False), ("b", 2, False), ("c", 2, True)):
        student, folder = damaged(model), tmp_path / name

        kills = [9] if kill else []

        def progress(event: dict[str, Any], folder: Path = folder, kills: list[int] = kills) -> None:
            if event["event"] == "step" and event["step"] in kills:
                kills.clear()
                os.kill(int((folder / "worker.pid").read_text()), signal.SIGKILL)

        options = TrainingOptions(epochs=6, threads=threads, checkpoint_seconds=0.0)
        fine_tune(student, model, data, folder, options, {"shift": 1}, progress)
        results.append(numbers(student))
    for other in results[1:]:
        assert all((other[name] == array).all() for name, array in results[0].items())


@needs_training
def test_the_best_epoch_comes_back(tmp_path: Path) -> None:
    """Labels that only fit by heart: the longer it trains, the worse it does on what is held out."""
    model = load("digits_mlp")
    data = digits(model, 1000)
    data = Dataset(data.inputs, np.random.default_rng(0).permutation(data.labels))
    losses: list[float] = []
    for name, epochs in (("short", 1), ("long", 30)):
        student = model.clone()
        fine_tune(
            student,
            model,
            data,
            tmp_path / name,
            TrainingOptions(epochs=epochs, batch=32, lr=3e-3, loss=Loss(distillation=0.0)),
        )
        order = np.random.default_rng(0).permutation(len(data))
        held = data.take(np.sort(order[: json.loads((tmp_path / name / "job.json").read_text())["held"]]))
        losses.append(cross_entropy(student, held))
    assert losses[1] < 1.05 * losses[0], losses


@needs_training
def test_training_ends_when_its_time_is_spent(tmp_path: Path) -> None:
    model = load("digits_resnet")
    seen: list[float] = []
    options = TrainingOptions(epochs=10_000, seconds=4.0)
    started = time.monotonic()
    fine_tune(
        damaged(model), model, digits(model), tmp_path, options, progress=lambda e: seen.append(e.get("progress", 0))
    )
    assert time.monotonic() - started < 30 and 0.8 < max(seen) <= 1.0


@needs_training
def test_what_fades_is_almost_gone_and_hardly_missed(tmp_path: Path) -> None:
    model = load("digits_mlp")
    units = find_units(analyse(model))
    alive = random_cut(units, np.random.default_rng(0), 0.5)
    fading = fading_parts(units, alive)
    student = model.clone()
    fine_tune(student, model, digits(model), tmp_path, TrainingOptions(epochs=4), fading=fading)
    for name, where in fading.items():
        before, after = (each.graph.initializers[name].const_value.numpy() for each in (model, student))  # type: ignore[union-attr]
        if before.ndim > 1:
            assert np.linalg.norm(after[where]) < 0.15 * np.linalg.norm(before[where])
    pruned, _ = cut(find_units(analyse(student)), alive)
    inputs = digits(model).inputs
    assert relative_difference(run_model(student, inputs), run_model(pruned, inputs)) < 0.1


@needs_training
def test_a_hung_worker_is_stopped(tmp_path: Path) -> None:
    model = load("digits_mlp")

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            os.kill(int((tmp_path / "job" / "worker.pid").read_text()), signal.SIGSTOP)

    options = TrainingOptions(epochs=200, patience=2.0)
    started = time.monotonic()
    with pytest.raises(TrainingError, match="said nothing"):
        fine_tune(damaged(model), model, digits(model), tmp_path / "job", options, progress=stop)
    assert time.monotonic() - started < 60


@needs_training
def test_a_worker_out_of_memory_says_so(tmp_path: Path) -> None:
    model = load("digits_resnet")
    student = damaged(model)
    before = numbers(student)
    with pytest.raises(TrainingError, match="memory"):
        fine_tune(student, model, digits(model), tmp_path / "job", TrainingOptions(memory_limit=10_000_000))
    assert all((before[name] == array).all() for name, array in numbers(student).items())


@needs_training
def test_a_loss_that_is_never_finite_ends_training_after_two_smaller_rates(tmp_path: Path) -> None:
    model, events = load("digits_mlp"), list[dict[str, Any]]()
    options = TrainingOptions(epochs=30, lr=1e30)
    with pytest.raises(TrainingError, match="not-finite"):
        fine_tune(damaged(model), model, digits(model), tmp_path / "job", options, progress=events.append)
    assert [e["message"].split("back, at ")[1] for e in events if e["event"] == "note"] == [
        "0.25 of the rate",
        "0.0625 of the rate",
    ]


@needs_training
def test_one_sample_whose_loss_is_not_finite_takes_training_back_and_on(tmp_path: Path) -> None:
    model = load("digits_mlp")
    data, student, events = digits(model), damaged(model), list[dict[str, Any]]()
    before = loss_of(student, model, data)
    (name, inputs), *_ = data.inputs.items()
    poisoned = inputs.copy()
    poisoned[7] = 3e38
    options = TrainingOptions(epochs=1, batch=16, lr=1e-3)
    fine_tune(student, model, Dataset({name: poisoned}, None), tmp_path / "job", options, progress=events.append)
    assert len([event for event in events if event["event"] == "note"]) == 1
    assert loss_of(student, model, data) < before
    assert all(np.isfinite(array).all() for array in numbers(student).values())


@needs_training
@pytest.mark.parametrize("name", NAMES)
def test_both_trainers_agree(name: str, tmp_path: Path) -> None:
    """Losses over 20 steps within 1e-3, and the weights at the end."""
    model = load(name)
    losses, weights = [], []
    for trainer in ("ort", "graph"):
        student, events = damaged(model), list[dict[str, Any]]()
        options = TrainingOptions(trainer, epochs=5, lr=1e-3, batch=64)  # type: ignore[arg-type]
        fine_tune(student, model, digits(model), tmp_path / trainer, options, progress=events.append)
        losses.append([event["loss"] for event in events if event["event"] == "step"])
        weights.append(numbers(student))
    assert len(losses[0]) in (15, 20)
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-3, rtol=1e-3)
    # Adam takes whole steps along gradients that are next to nothing, whose sign is rounding: all but few agree
    apart = [np.abs(weights[1][n] - a) > 1e-3 * np.abs(a).max() + 1e-4 for n, a in weights[0].items()]
    assert np.mean(np.concatenate([each.ravel() for each in apart])) < 0.05


@needs_training
def test_frozen_parameters_keep_their_numbers(tmp_path: Path) -> None:
    model = load("digits_mlp")
    student = damaged(model)
    before = {name: array.copy() for name, array in numbers(student).items()}
    frozen = next(iter(before))
    options = TrainingOptions(epochs=1, freeze=(frozen[:-1] + "?",))
    fine_tune(student, model, digits(model), tmp_path / "job", options)
    changed = {name for name, array in numbers(student).items() if (array != before[name]).any()}
    assert frozen not in changed and changed
    with pytest.raises(TrainingError, match="nothing in the model"):
        fine_tune(student, model, digits(model), tmp_path / "none", TrainingOptions(freeze=("*",)))


@needs_training
def test_what_lies_behind_an_operator_without_gradient_is_frozen_and_the_rest_trains(tmp_path: Path) -> None:
    model = graph(
        "(float[2,3,6,6] x, float[4,3,1,1] w, float[2,5,5,2] g, float[5,4,1,1] v) => (float[2,5,5,5] y) "
        "{ h = Conv(x, w) s = GridSample(h, g) y = Conv(s, v) }"
    )
    assert {name: "GridSample" in reason for name, reason in untrainable(model).items()} == {"w": True}
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 6)).astype(np.float32)
    student, events = damaged(model), list[dict[str, Any]]()
    before = numbers(student)
    options = TrainingOptions(epochs=3, lr=0.01, batch=2)
    fine_tune(student, model, Dataset({"x": x}, None), tmp_path / "job", options, progress=events.append)
    changed = {name for name, array in numbers(student).items() if (array != before[name]).any()}
    assert changed == {"v"}
    assert "leaves 1 initializers as they are" in events[0]["message"]


@needs_training
@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ort", "graph"])
def test_twenty_kills_at_random_steps_change_nothing(trainer: Trainer, tmp_path: Path) -> None:
    model, rng = load("digits_mlp"), np.random.default_rng(0)
    options = TrainingOptions(trainer, epochs=200, checkpoint_seconds=0.0)
    whole = damaged(model)
    fine_tune(whole, model, digits(model), tmp_path / "whole", options)
    student, folder, kills = damaged(model), tmp_path / "killed", [0]

    def progress(event: dict[str, Any]) -> None:
        if event["event"] == "step" and kills[0] < 20 and rng.random() < 0.03:
            kills[0] += 1
            os.kill(int((folder / "worker.pid").read_text()), signal.SIGKILL)

    while not (folder / "result.npz").exists():  # a run gives up after two restarts; the next one resumes
        with contextlib.suppress(WorkerDiedError):
            fine_tune(student, model, digits(model), folder, options, progress=progress)
    assert kills[0] == 20
    assert all((numbers(student)[name] == array).all() for name, array in numbers(whole).items())


@needs_training
def test_an_average_of_weights_changes_less_and_is_resumed_to_the_bit(tmp_path: Path) -> None:
    model = load("digits_mlp")
    results = []
    for name, ema, kill in (("plain", 0.0, False), ("slow", 0.9, False), ("killed", 0.9, True)):
        student, kills = damaged(model), [13] if kill else []
        before = numbers(damaged(model))

        def progress(event: dict[str, Any], folder: Path = tmp_path / name, kills: list[int] = kills) -> None:
            if event["event"] == "step" and event["step"] in kills:
                kills.clear()
                os.kill(int((folder / "worker.pid").read_text()), signal.SIGKILL)

        options = TrainingOptions(epochs=6, ema=ema, checkpoint_seconds=0.0)
        fine_tune(student, model, digits(model), tmp_path / name, options, None, progress)
        results.append((numbers(student), sum(float(np.abs(a - before[n]).sum()) for n, a in numbers(student).items())))
    assert results[1][1] < results[0][1]
    assert all((results[2][0][name] == array).all() for name, array in results[1][0].items())


@needs_training
def test_training_stops_when_held_out_samples_say_so(tmp_path: Path) -> None:
    model = load("digits_mlp")
    events: list[dict[str, Any]] = []
    options = TrainingOptions(epochs=50, batch=32, lr=0.3, stop_after=2)  # far too high: it only gets worse
    fine_tune(model.clone(), model, digits(model, 640), tmp_path / "job", options, progress=events.append)
    assert 2 <= events[-2]["epoch"] < 20


SEQUENCES = "(float[N,3,6] x, float[6,4] w) => (float[N,3,4] y) { y = MatMul(x, w) }"
ROW = "(float[N,6] x, float[6,4] w) => (float[N,4] y) { y = MatMul(x, w) }"
BINARY = "(float[N,6] x, float[6,4] w) => (float[N,4] y) { s = MatMul(x, w) y = Sigmoid(s) }"
MAP = "(float[N,6,3,3] x, float[4,6,1,1] w) => (float[N,4,3,3] y) { y = Conv(x, w) }"
LABELLED: dict[str, tuple[str, Loss]] = {
    "cross-entropy, classes last": (SEQUENCES, Loss()),
    "cross-entropy, some don't count": (SEQUENCES, Loss()),
    "cross-entropy of a map": (MAP, Loss()),
    "smoothed": (ROW, Loss(smoothing=0.2)),
    "smoothed, some don't count": (MAP, Loss(smoothing=0.2)),
    "mixed": (ROW, Loss(mix=1.0)),
    "mixed map, smoothed, some don't count": (MAP, Loss(smoothing=0.2, mix=1.0)),
    "binary": (BINARY, Loss(("bce",))),
    "binary, weighted": (BINARY, Loss(("y=bce:3",))),
    "binary, mixed": (BINARY, Loss(("bce",), mix=1.0)),
    "absolute": (ROW, Loss(("l1",))),
}


def label_loss(name: str, y: np.ndarray, targets: np.ndarray, axis: int) -> float:
    if "binary" in name:
        return float(-(targets * np.log(y) + (1 - targets) * np.log(1 - y)).mean())
    if name == "absolute":
        return float(np.abs(y - targets).mean())
    log_p = y - np.log(np.exp(y).sum(axis, keepdims=True))
    chosen = -np.take_along_axis(log_p, np.expand_dims(np.maximum(targets, 0), axis), axis).squeeze(axis)
    if "smoothed" in name:
        chosen = 0.8 * chosen - 0.2 * log_p.mean(axis)
    return float(chosen[targets >= 0].mean())


@pytest.mark.parametrize("name", LABELLED)
def test_losses_on_labels(name: str) -> None:
    text, asked = LABELLED[name]
    model, rng = graph(text), np.random.default_rng(0)
    x = random_inputs(model, seed=0, batch=5)["x"]
    y = run_model(model, {"x": x})[0].astype(np.float64)
    axis = 1 if text is MAP else -1

    def targets() -> np.ndarray:
        if asked.labels:
            return rng.random(y.shape).astype(np.float32)
        return np.asarray(rng.integers(-1 if "don't" in name else 0, 4, y.max(axis).shape), np.int64)

    first, other, share = targets(), targets(), np.float32(0.3)
    plan = plan_loss(model, Dataset({"x": x}, first), replace(asked, distillation=0.0))
    feeds = {"x": x, "onnxprune.labels": first}
    expected = label_loss(name, y, first, axis)
    if asked.mix:
        feeds |= {"onnxprune.labels.other": other, "onnxprune.mixed": np.full(5, share)}
        expected = share * expected + (1 - share) * label_loss(name, y, other, axis)
    found = run_model(training_graph(model, plan, {name: array.shape for name, array in feeds.items()})[0], feeds)[0]
    assert float(found) == pytest.approx(float(expected) * (3 if "weighted" in name else 1), rel=1e-5)


TWO = "(float[N,6] x, float[6,4] w, float[6,3] v) => (float[N,4] y, float[N,3] z) { y = MatMul(x, w) z = MatMul(x, v) }"


def test_each_output_has_its_loss_weight_and_distance() -> None:
    model, rng = graph(TWO), np.random.default_rng(0)
    x = random_inputs(model, seed=0, batch=5)["x"]
    arrays = {"x": x, "labels": rng.integers(0, 4, 5), "labels.z": rng.random((5, 3)).astype(np.float32)}
    data = check_data(arrays, model)
    plan = plan_loss(model, data, Loss(("cross-entropy", "z=l1:2"), distillation=0.25))
    y, z = (array.astype(np.float64) for array in run_model(model, {"x": x}))
    feeds = {"x": x, "onnxprune.labels": arrays["labels"], "onnxprune.labels.z": arrays["labels.z"]}
    feeds |= {"onnxprune.teacher.0": y.astype(np.float32), "onnxprune.teacher.1": 2 * z.astype(np.float32)}
    loss, *heads = run_model(training_graph(model, plan, {n: array.shape for n, array in feeds.items()})[0], feeds)
    labels = label_loss("", y, arrays["labels"], -1) + 2 * np.abs(z - arrays["labels.z"]).mean()
    assert float(loss) == pytest.approx(0.75 * labels + 0.25 * (2 * 0.25) / 3, rel=1e-4)
    assert len(heads) == 2
    defaults = plan_loss(model, data)
    assert [(loss.kind, loss.weight) for loss in defaults.labels] == [("cross-entropy", 1), ("mse", 1)]
    assert [distance.kind for distance in defaults.distances] == ["kl", "mse"]


NAMED: dict[str, tuple[tuple[str, ...], Callable[[np.ndarray, np.ndarray, np.ndarray], float]]] = {
    "an output alone": (("z=mse",), lambda y, z, h: float(np.mean(z**2) / np.mean((2 * z) ** 2))),
    "an inner value": (("h=mse",), lambda y, z, h: 0.25),
    "by angle": (("h=cosine",), lambda y, z, h: 0.0),
    "by angle, the other way round": (("y=cosine",), lambda y, z, h: 2.0),
    "between classes of a named output": (("z=kl",), lambda y, z, h: divergence(z, 2 * z)),
    "weighed": (("h=mse:3", "y=cosine"), lambda y, z, h: (3 * 0.25 + 2.0) / 4),
}
INNER = """(float[N,6] x, float[6,4] w, float[4,4] u, float[6,3] v) => (float[N,4] y, float[N,3] z)
{ h = MatMul(x, w) y = MatMul(h, u) z = MatMul(x, v) }"""


def divergence(student: np.ndarray, teacher: np.ndarray, temperature: float = 2.0) -> float:
    log_p, log_q = (
        a / temperature - np.log(np.exp(a / temperature).sum(-1, keepdims=True)) for a in (teacher, student)
    )
    return float(temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("name", NAMED)
def test_distances_by_name(name: str) -> None:
    asked, expected = NAMED[name]
    model = graph(INNER)
    x = random_inputs(model, seed=0, batch=5)["x"]
    plan = plan_loss(model, Dataset({"x": x}, None), Loss(distances=asked))
    y, z = run_model(model, {"x": x})
    h = x @ np.asarray(model.graph.initializers["w"].const_value)
    taught = {"y": -y, "z": 2 * z, "h": 2 * h}
    feeds = {"x": x, **{f"onnxprune.teacher.{i}": taught[v] for i, v in enumerate(plan.compared)}}
    trains, *_ = training_graph(model, plan, {n: array.shape for n, array in feeds.items()})
    loss, *heads = run_model(trains, {v.name: feeds[v.name] for v in trains.graph.inputs})
    assert float(loss) == pytest.approx(expected(*(a.astype(np.float64) for a in (y, z, h))), rel=1e-4, abs=1e-6)
    np.testing.assert_allclose(heads[0], y, rtol=1e-6)  # what accuracy is shown of stays the first output


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("hh=mse",), "nearest are h,"),
        (("y=far",), "kl, mse, cosine"),
        (("y=mse:x",), "no weight"),
        (("y=kl", "kl"), "one distance"),
    ],
)
def test_distances_that_cannot_be_are_refused(asked: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_loss(graph(INNER), Dataset({"x": np.zeros((2, 6), np.float32)}, None), Loss(distances=asked))


def test_an_inner_value_that_was_cut_cannot_be_compared(tmp_path: Path) -> None:
    whole, thin = graph(INNER), graph(INNER.replace("float[6,4] w, float[4,4] u", "float[6,2] w, float[2,4] u"))
    data = Dataset({"x": random_inputs(whole, 0, batch=64)["x"]}, None)
    with pytest.raises(TrainingError, match=r"--distil h: .*--protect"):
        fine_tune(thin, whole, data, tmp_path / "job", TrainingOptions(loss=Loss(distances=("h=cosine",))))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("q=l1",), "outputs are"),
        (("y=l1:much",), "no weight"),
        (("l1", "y=mse"), "one loss"),
        (("z=l1",), "labels.z"),
        (("huber",), "no such loss"),
        (("l1", "mine.onnx"), "can't be combined"),
        (("none.onnx",), "no such file"),
        (("nowhere:loss",), "nowhere"),
    ],
)
def test_losses_that_cannot_be_are_refused(asked: tuple[str, ...], message: str) -> None:
    x = np.zeros((2, 6), np.float32)
    with pytest.raises(UsageError, match=message):
        plan_loss(graph(TWO), Dataset({"x": x}, np.zeros((2, 4), np.float32)), Loss(asked))


def test_a_model_without_an_output_to_learn_from_says_so() -> None:
    model = graph("(float[N,6] x, float[6,4] w) => (int64[N,1] y) { h = MatMul(x, w) y = ArgMax<axis=1>(h) }")
    with pytest.raises(TrainingError, match="--epochs 0"):
        plan_loss(model, Dataset(random_inputs(model, 0), None))


OWN = """<ir_version: 9, opset_import: ["" : 20]>
own (float[N,4] y, int64[N] labels, float[N,4] teacher_y, float[N] labels_weight) => (float loss) {
    log_p = LogSoftmax(y) none = NegativeLogLikelihoodLoss<reduction = "none">(log_p, labels)
    weighed = Mul(none, labels_weight) d = Sub(y, teacher_y) s = Mul(d, d) a = ReduceMean<keepdims = 0>(weighed)
    b = ReduceMean<keepdims = 0>(s) loss = Add(a, b)
}"""


def test_a_loss_of_ones_own_reads_outputs_labels_and_the_teacher(tmp_path: Path) -> None:
    model, rng = graph(TWO, opset=18), np.random.default_rng(0)
    onnx.save(onnx.parser.parse_model(OWN), tmp_path / "own.onnx")
    x = random_inputs(model, seed=0, batch=5)["x"]
    y, z = run_model(model, {"x": x})
    labels, weight = rng.integers(0, 4, 5), rng.random(5).astype(np.float32)
    data = check_data({"x": x, "labels": labels.astype(np.int32), "labels.weight": weight}, model)
    plan = plan_loss(model, data, Loss((str(tmp_path / "own.onnx"),), distillation=0.5, mix=1.0))
    targets = plan.targets(data)
    assert {name: array.dtype for name, array in targets.items()} == {
        "onnxprune.labels": np.int64, "onnxprune.labels.weight": np.float32,
    }  # fmt: skip
    feeds: dict[str, Any] = {"x": x, **targets, **{f"{name}.other": array for name, array in targets.items()}}
    feeds |= {"onnxprune.teacher.0": y, "onnxprune.teacher.1": z, "onnxprune.teacher.2": 2 * y}
    feeds["onnxprune.mixed"] = np.full(5, 0.5, np.float32)
    sizes = {n: array.shape for n, array in feeds.items()}
    found = run_model(training_graph(model, plan, sizes)[0], feeds)[0]
    rows = log_probabilities(y.astype(np.float64))[np.arange(5), labels]
    assert float(found) == pytest.approx(0.5 * (-(rows * weight).mean() + (y**2).mean()), rel=1e-4)
    for changed, message in (
        ("labels_weight", "labels_other"),
        ("teacher_y", "teacher_q"),
        ("float loss", "int64 loss"),
    ):
        onnx.save(onnx.parser.parse_model(OWN.replace(changed, message)), tmp_path / "bad.onnx")
        with pytest.raises(UsageError, match=r"--loss .*bad"):
            plan_loss(model, data, Loss((str(tmp_path / "bad.onnx"),)))


def own_loss() -> onnx.ModelProto:
    """For `module:function`."""
    return onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 17]> own (float[N,10] logits, int64[N] labels) => (float loss) {
        loss = SoftmaxCrossEntropyLoss(logits, labels) }"""
    )


@needs_training
@pytest.mark.parametrize("trainer", ["ort", "graph"])
@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_a_loss_of_ones_own_is_lowered(trainer: Any, mix: float, tmp_path: Path) -> None:
    model = load("digits_mlp")
    data, student = digits(model), damaged(model)
    before = cross_entropy(student, data)
    loss = Loss(("tests.test_training:own_loss",), distillation=0.0, mix=mix)
    fine_tune(student, model, data, tmp_path / "job", TrainingOptions(trainer, epochs=5, loss=loss))
    assert cross_entropy(student, data) < 0.8 * before


def test_inner_values_on_the_trunk_are_compared_where_nothing_was_cut() -> None:
    text = (
        "(float[N,3,6,6] x, float[4,3,1,1] w, float[{0},4,1,1] a, float[4,{0},1,1] b, float[{1},4,1,1] c, "
        "float[5,{1},1,1] v) => (float[N,5,6,6] y) {{ h = Conv(x, w) i = Conv(h, a) r = Relu(i) j = Conv(r, b) "
        "s = Add(h, j) t = Conv(s, c) y = Conv(t, v) }}"
    )
    whole, cut_inside, cut_all = (graph(text.format(*widths)) for widths in ((6, 7), (3, 7), (3, 2)))
    plan = plan_loss(whole, Dataset({}, None))
    assert with_features(whole, whole, plan, 1.0, None).features == ("s", "t")
    assert with_features(cut_inside, whole, plan, 1.0, None).features == ("s", "t")
    assert with_features(cut_all, whole, plan, 1.0, None).features == ("s",)
    x = random_inputs(whole, seed=0, batch=2)["x"]
    compared = replace(plan, features=("s",), weight=1.0)
    teacher = run_model(teacher_graph(whole, compared), {"x": x})
    feeds = {"x": x, "onnxprune.teacher.0": teacher[0], "onnxprune.teacher.1": 2 * teacher[1]}
    loss = run_model(training_graph(whole, compared, {name: array.shape for name, array in feeds.items()})[0], feeds)[0]
    assert float(loss) == pytest.approx(0.25, rel=1e-4)  # the square of one half


def test_maps_of_class_scores_are_judged_by_position() -> None:
    model = graph("(float[N,6,3,5] x, float[4,6,1,1] w) => (float[N,4,3,5] y) { y = Conv(x, w) }")
    x = random_inputs(model, seed=0, batch=20)["x"]
    labels = run_model(model, {"x": x})[0].argmax(1)
    labels[:5] = (labels[:5] + 1) % 4
    data = check_data({"x": x, "labels": labels}, model)
    verdict = Judge(model, data, find_metric(None, data), None, True).measure(model)
    assert verdict.value == 75.0 and verdict.drop == 0
    with pytest.raises(DataError, match="classes are 0 to 3"):
        check_data({"x": x, "labels": labels + 1}, model)


def test_a_loss_that_labels_do_not_fit() -> None:
    model = graph("(float[N,6] x, float[6,4] w) => (float[N,4] y) { y = MatMul(x, w) }")
    x = np.zeros((2, 6), np.float32)
    for kind, labels in (("bce", np.zeros(2, np.int64)), ("cross-entropy", np.zeros((2, 4), np.float32)), ("l1", None)):
        with pytest.raises(UsageError, match=f"--loss {kind}"):
            plan_loss(model, Dataset({"x": x}, labels), Loss((kind,)))


def test_where_there_is_no_wheel_the_other_trainer_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert runtime.choose_trainer("auto") == ("ort" if runtime.supported() else "graph")
    monkeypatch.setattr(runtime, "here", lambda: ("3.13", "Linux-aarch64"))
    monkeypatch.setattr(runtime, "runtime_folder", lambda: tmp_path / "none")
    model = load("digits_mlp")
    student = damaged(model)
    before = loss_of(student, model, digits(model))
    fine_tune(student, model, digits(model), tmp_path / "job", TrainingOptions(epochs=5))
    assert loss_of(student, model, digits(model)) < 0.8 * before
    assert (tmp_path / "job" / "backward.onnx").exists()


def test_a_platform_without_a_wheel_is_told_what_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtime, "here", lambda: ("3.13", "Linux-aarch64"))
    monkeypatch.setattr(runtime, "runtime_folder", lambda: tmp_path / "none")
    with pytest.raises(TrainingError, match="--epochs 0"):
        runtime.install_runtime()


def test_a_wheel_with_another_hash_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runtime, "here", lambda: ("3.11", "Linux-x86_64"))
    monkeypatch.setattr(runtime, "runtime_folder", lambda: tmp_path / "cache" / "runtime")
    wheel = tmp_path / "onnxruntime_training_cpu.whl"
    wheel.write_bytes(b"not the wheel")
    with pytest.raises(TrainingError, match="SHA-256"):
        runtime.install_runtime(wheel)
    with pytest.raises(TrainingError, match="no such file"):
        runtime.install_runtime(tmp_path / "missing.whl")
    assert not (tmp_path / "cache" / "runtime").exists()
    assert json.dumps(sorted(p.name for p in (tmp_path / "cache").iterdir())) == "[]"
