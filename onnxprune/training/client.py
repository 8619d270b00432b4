"""The main process's side of fine-tuning: prepares a job folder, watches the worker, takes the weights back."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxprune.cutting.plan import Plan
from onnxprune.errors import TrainingError
from onnxprune.evaluating.data import Dataset, chunks, fixed_batch, model_inputs
from onnxprune.evaluating.evaluate import predict
from onnxprune.graph.files import write_json
from onnxprune.graph.model import save_model
from onnxprune.repairing.repair import reestimate_batch_norm
from onnxprune.training.backward import gradient_model
from onnxprune.training.batches import augment
from onnxprune.training.forward import teacher_graph, training_graph, uses_batch_statistics
from onnxprune.training.losses import Loss, check_comparable, in_units, plan_loss, with_features
from onnxprune.training.optimizer import usual_rate
from onnxprune.training.runtime import Trainer, choose_trainer, prepare_trainer
from onnxprune.training.worker import write_arrays

HELD_OUT = 512  # samples by which the rate and the best epoch are chosen, at most
BATCH = 64  # samples of a step, where none are given
STEPS_AN_EPOCH, LEAST_BATCH = 64, 16  # of few samples smaller batches make more steps
FEW_HELD = 32  # of them, where there are few samples
SHARD = 32  # samples a thread works on at a time; batch statistics are taken over them
GPU_SHARD = 256  # samples that a GPU works on at a time
PROBE = 512  # samples that an augmentation is tried on, and the units of distances are taken from
TOLERATED = 0.1  # of the answers that may turn wrong under an augmentation

RESTARTS = 2  # of a worker that died without a word

Progress = Callable[[dict[str, Any]], None]


class WorkerDiedError(TrainingError):
    """The worker ended or hung without saying why; starting again from its checkpoint may help."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to fine-tune, and by which `trainer` (see `choose_trainer`).

    `lr` None is chosen by short trials around the one that suits so many matrices (`usual_rate`). With `seconds`
    training ends after that time, if not by `epochs` before, and the learning rate falls accordingly: the result then
    depends on the machine. `patience` is how many seconds without a word make a worker count as hung; `memory_limit`
    how many bytes training may take beside the runtime itself. With `ema` the result is an average of the weights that
    forgets by this factor in each step; `stop_after` ends training after so many epochs without a lower loss on held-
    out samples; parameters whose names match one of the patterns in `freeze` stay as they are. Batch normalisation
    keeps its statistics, or with `batch_statistics` takes those of each shard, and those of the data in the end. A
    batch is worked on in shards, so its size doesn't decide the memory.
    """

    trainer: Trainer = "auto"
    epochs: int = 3
    seconds: float | None = None
    lr: float | None = None
    batch: int | None = None
    weight_decay: float = 1e-4
    clip: float = 5.0
    loss: Loss = field(default_factory=Loss)
    ema: float = 0.0
    stop_after: int | None = None
    freeze: tuple[str, ...] = ()
    batch_statistics: bool = False
    threads: int = 2
    seed: int = 0
    checkpoint_seconds: float = 20.0
    patience: float = 300.0
    memory_limit: int | None = None


def fine_tune(
    model: ir.Model,
    teacher: ir.Model,
    data: Dataset,
    folder: Path,
    options: TrainingOptions,
    augmentation: dict[str, Any] | None = None,
    progress: Progress = lambda event: None,
    fading: dict[str, np.ndarray[Any, Any]] | None = None,
    plan: Plan | None = None,
) -> None:
    """Trains the parameters of `model` in place, in a worker process.

    A part of the data, at most 512 samples, is held out: what comes back are the weights after the epoch that did best
    on it, or those that there were before. `fading` names, by boolean arrays, parts of parameters that shrink to a
    hundredth on the way, the faster the further it is (growing regularisation: Wang et al. 2021, Neural Pruning via
    Growing Regularization, section 3.2, here as decoupled decay). `plan` says what was cut from the teacher, so that
    inner values of both can be compared.

    A folder that holds a job already is resumed from its last checkpoint: the result is equal to the bit to that of a
    run that was not interrupted. Raises `TrainingError` when the worker fails, dies, hangs or is out of memory; `model`
    is then unchanged.
    """

    def note(text: str) -> None:
        progress({"event": "note", "message": text})

    runtime = prepare_trainer(options.trainer, note)
    if not (folder / "job.json").exists():
        try:
            _prepare(model, teacher, data, folder, options, augmentation or {}, fading, note, plan)
        except OSError as error:
            raise TrainingError(f"training failed (disk): {error.strerror}: {folder}; free some space") from error
    for name, array in _work(folder, runtime, options, progress).items():
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    shard = json.loads((folder / "job.json").read_text())["shard"]
    if options.batch_statistics and uses_batch_statistics(model, shard):
        reestimate_batch_norm(model, data, options.threads)


def gradient_moments(
    model: ir.Model, data: Dataset, folder: Path, options: TrainingOptions
) -> dict[str, np.ndarray[Any, Any]]:
    """The mean, and the mean square, of the loss's gradient over batches of `data`, by parameter.

    Float32 arrays of shape (2, *parameter's). Nothing is trained. Raises `TrainingError` as `fine_tune` does.
    """
    runtime = prepare_trainer(options.trainer)
    options = replace(options, batch=fixed_batch(model) or SHARD)
    _prepare(model, model, data, folder, options, {"task": "gradients"})
    return _work(folder, runtime, options, lambda event: None)


def minimise(
    graph: ir.Model, names: list[str], count: int, folder: Path, options: TrainingOptions, progress: Progress
) -> dict[str, np.ndarray[Any, Any]]:
    """The initializers `names` of a graph, changed so that its first output, the loss, falls; by name.

    The graph's only input is given the numbers from 0 to `count`, shard by shard, in int64: it can look things up by
    them. Raises `TrainingError` as `fine_tune` does.
    """
    runtime = prepare_trainer(options.trainer, lambda line: progress({"event": "note", "message": line}))
    folder.mkdir(parents=True)
    differentiated = _save_graph(graph, names, folder, options.trainer)
    name = graph.graph.inputs[0].name or ""
    inputs = {name: str(_array_file(folder, "input0", np.arange(count)))}
    given = {"inputs": inputs, "batch": count, "relative": False, "trials": False}
    _write_job(folder, options, {**differentiated, **given})
    return _work(folder, runtime, options, progress)


def _work(
    folder: Path, runtime: Path | None, options: TrainingOptions, progress: Progress
) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays that a job's worker leaves, which is started again where it dies."""
    for attempt in range(RESTARTS + 1):
        if (folder / "result.npz").exists():
            break
        try:
            _run_worker(folder, runtime, options, progress)
        except WorkerDiedError as error:
            if attempt == RESTARTS:
                raise
            progress({"event": "note", "message": f"{error}; starting it again from its last checkpoint"})
    with np.load(folder / "result.npz") as arrays:
        return dict(arrays)


def _prepare(
    model: ir.Model,
    teacher: ir.Model,
    data: Dataset,
    folder: Path,
    options: TrainingOptions,
    augmentation: dict[str, Any],
    fading: dict[str, np.ndarray[Any, Any]] | None = None,
    note: Callable[[str], None] = lambda text: None,
    plan: Plan | None = None,
) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    loss = plan_loss(model, data, options.loss)
    if options.loss.distances:
        check_comparable(model, teacher, loss)
    if loss.share > 0 and options.loss.features > 0:
        loss = with_features(model, teacher, loss, options.loss.features, plan)
    most_held = 0 if augmentation.get("task") == "gradients" or fading else HELD_OUT  # what fades goes on to the end
    if loss.share == 1 and not options.loss.distances and augmentation.get("task") != "gradients":
        outputs = replace(loss, features=(), kept={})
        loss = in_units(loss, predict(teacher_graph(teacher, outputs), data.take(slice(0, PROBE)), options.threads))
    trainer = choose_trainer(options.trainer)
    most = GPU_SHARD if trainer == "cuda" else SHARD
    shard, batch, held = _portions(len(data), options.batch, fixed_batch(model), most_held, most)
    arrays = {**data.inputs, **loss.targets(data)}
    sizes = {name: (shard, *array.shape[1:]) for name, array in arrays.items()}
    graph, names, frozen = training_graph(model, loss, sizes, options.freeze, trainer, options.batch_statistics)
    for reason, count in Counter(frozen.values()).items():
        note(f"fine-tuning leaves {count} initializers as they are: {reason}")
    differentiated = _save_graph(graph, names, folder, options.trainer)
    save_model(teacher_graph(teacher, loss), folder / "teacher.onnx")
    files = {name: str(_array_file(folder, f"input{i}", array)) for i, (name, array) in enumerate(arrays.items())}
    labels = {name: files.pop(name) for name in list(files) if name not in data.inputs}
    if fading:
        np.savez(folder / "fading.npz", **{name: where for name, where in fading.items() if name in names})  # type: ignore[arg-type]
    job = {
        "inputs": files,
        "labels": labels,
        "distil": loss.share > 0 or bool(loss.own and loss.own.teachers),
        "mix": loss.mix,
        "shard": shard,
        "batch": batch,
        "held": held,
        "fading": str((folder / "fading.npz").resolve()) if fading else None,
        **differentiated,
        **augmentation,
    }
    _write_job(folder, options, job)


def _save_graph(graph: ir.Model, names: list[str], folder: Path, trainer: Trainer) -> dict[str, Any]:
    """Leaves the weights, and the graph that the worker differentiates, or the one that is; what a job says of them."""
    weights = {name: graph.graph.initializers[name].const_value.numpy() for name in names}  # type: ignore[union-attr]
    write_arrays(folder / "weights.npz", weights)
    trainer = choose_trainer(trainer)
    gpu = trainer == "cuda"
    job = {"lr": usual_rate(sum(array.ndim > 1 for array in weights.values())), "gpu": gpu}
    if trainer == "ort":
        save_model(graph, folder / "forward.onnx")
        return job
    proto, heads, gradients = gradient_model(graph, names, gpu)
    onnx.save(proto, folder / "backward.onnx")
    return {**job, "heads": heads, "gradients": gradients}


def _portions(samples: int, batch: int | None, fixed: int | None, most_held: int, most: int) -> tuple[int, int, int]:
    """Samples worked on at a time (at most `most`), of a step, and held out: the first divides the other two.

    A tenth is held out, and of few samples, where a tenth tells nothing, up to a quarter. Without a given `batch` it is
    such that an epoch has enough steps.
    """
    held = min(most_held, max(samples // 10, min(FEW_HELD, samples // 4)))
    usual = min(BATCH, max(1, (samples - held) // STEPS_AN_EPOCH // LEAST_BATCH) * LEAST_BATCH)
    if fixed is not None:
        batch = -(-(batch or usual) // fixed) * fixed
        batch = max(min(batch, (samples - held) // fixed * fixed), fixed)
        return fixed, batch, held // fixed * fixed
    batch = min(batch or usual, samples - held)
    shard = batch // -(-batch // most)
    if 0 < held < shard:
        shard = held
    return shard, batch // shard * shard, held // shard * shard


def _write_job(folder: Path, options: TrainingOptions, given: dict[str, Any]) -> None:
    """What the worker reads; its presence says that the folder is complete."""
    job = {
        "task": "tune",
        "labels": {},
        "distil": False,
        "mix": 0.0,
        "shard": SHARD,
        "held": 0,
        "fading": None,
        "relative": True,
        "trials": True,
        "flip": False,
        "shift": 0,
        "layout": "nchw",
        **{
            name: getattr(options, name)
            for name in (
                "epochs", "seconds", "weight_decay", "clip", "threads", "seed", "checkpoint_seconds",
                "memory_limit", "ema", "stop_after",
            )
        },
        **given,
        **({"lr": options.lr, "trials": False} if options.lr is not None else {}),
    }  # fmt: skip
    write_json(folder / "job.json", job)


def _array_file(folder: Path, name: str, array: np.ndarray[Any, Any]) -> Path:
    """Written row by row: a full disk is then an error, where writing to a mapped file would kill the process."""
    path = (folder / f"{name}.npy").resolve()
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        for rows in chunks(array):
            file.write(np.ascontiguousarray(rows).data)
    return path


def _run_worker(folder: Path, runtime: Path | None, options: TrainingOptions, progress: Progress) -> None:
    package = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(str(place) for place in (runtime, package, os.environ.get("PYTHONPATH")) if place)
    command = [sys.executable, "-P", "-m", "onnxprune.training.worker", str(folder)]  # nothing from the current folder
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=log,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            _watch(process, options.patience, progress, folder)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _watch(process: subprocess.Popen[bytes], patience: float, progress: Progress, folder: Path) -> None:
    """Passes the worker's events on until it is done. Raises `TrainingError` for every other end."""
    events: queue.Queue[bytes | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            events.put(line)
        events.put(None)

    threading.Thread(target=read, daemon=True).start()
    (folder / "worker.pid").write_text(str(process.pid))
    last = time.monotonic()
    while True:
        try:
            line = events.get(timeout=1)
        except queue.Empty:
            if time.monotonic() - last > patience:
                raise WorkerDiedError(
                    f"the training worker said nothing for {patience:.0f} s and was stopped"
                ) from None
            continue
        last = time.monotonic()
        if line is None:
            code = process.wait()
            reason = signal.Signals(-code).name if code < 0 else f"exit status {code}"
            raise WorkerDiedError(f"the training worker died ({reason}); see {folder / 'worker.log'}")
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["event"] == "error":
            raise TrainingError(f"training failed ({event['kind']}): {event['message']}")
        if event["event"] == "done":
            return
        progress(event)


def choose_augmentation(model: ir.Model, data: Dataset, threads: int | None) -> dict[str, Any]:
    """Flips and shifts for images, each only if the uncut model is nearly as right under it.

    Digits must not be mirrored, photographs may be: the model itself knows. Right means the labels where there are any,
    else the model's own answers to the unchanged images. Without labels images are moved in any case: the uncut model
    answers for the moved ones, too. Raises nothing: what isn't images isn't augmented.
    """
    values = model_inputs(model)
    shape = list(values[0].shape or ())
    if len(values) != 1 or len(shape) != 4 or values[0].dtype != ir.DataType.FLOAT:
        return {}
    layout = "nchw" if shape[1] in (1, 3, 4) else "nhwc" if shape[3] in (1, 3, 4) else None
    part = data.take(slice(0, PROBE))
    images = part.inputs[values[0].name or ""]
    if layout is None:
        return {}
    shift = max(1, images.shape[2] // 8)
    answered = {"flip": False, "shift": shift, "layout": layout} if data.labels is None and not data.others else {}
    scores = predict(model, part, threads)[0]
    if len(part) < 16 or scores.ndim != 2 or scores.shape[1] < 2:
        return answered
    labelled = part.labels is not None and part.labels.ndim == 1 and part.labels.dtype.kind in "iu"
    wanted = part.labels if labelled else scores.argmax(1)

    def right(changed: np.ndarray[Any, Any]) -> float:
        answers = predict(model, Dataset({values[0].name or "": changed}, None), threads)[0].argmax(1)
        return float((answers == wanted).mean())

    least = right(images) - TOLERATED
    rng = np.random.default_rng(0)
    return {
        "flip": right(augment(images, True, 0, layout, rng)) >= least,
        "shift": shift if answered or right(augment(images, False, shift, layout, rng)) >= least else 0,
        "layout": layout,
    }
