"""The worker process: builds the gradient graph, trains, and reports every step as a JSON line on stdout.

Run as `python -m onnxprune.training.worker JOB` with the training runtime first on the path. JOB is a folder with
`job.json`, `forward.onnx`, `teacher.onnx` and the data as .npy; the results are `result.npz` and checkpoints there.

Two things were measured and decide the shape of this file. The gradient graph runs as a plain inference session on one
thread, several shards of a batch at once: 1.75 times as fast on two cores as ONNX Runtime's own training module, whose
step holds the interpreter's lock. And the optimizer is NumPy: then the whole state is a few arrays, and a resumed run
is equal to the bit. Shards are summed in a fixed order, so results don't depend on the number of threads.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from onnxprune.training.batches import Batches
from onnxprune.training.optimizer import AdamW, learning_rate

Array = NDArray[Any]
FADED = 0.01  # what is left of weights that fade
SAFE = 10  # steps between states that training can go back to, or resume from
TRIED = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)  # times the usual rate
LEAST_TRIAL, MOST_TRIAL, TRIAL_SHARE = 50, 100, 10  # steps of a trial: a tenth of all, in bounds
NEAR_BEST = 1.15  # times the lowest loss, of a rate that is as good in the end: a few steps favour low rates
TRIAL_TIME = 0.15  # of the time, for all trials
ROLLBACKS, SLOWER = 2, 0.25  # of a loss that isn't finite: how often, and what becomes of the learning rate


def say(**event: object) -> None:
    """One event for the client."""
    print(json.dumps(event), flush=True)


def import_runtime() -> tuple[Any, Any]:
    """onnxruntime and, where it is the training runtime, its artifacts module.

    That package's own __init__ would want PyTorch.
    """
    import onnxruntime

    if not os.path.isdir(os.path.join(os.path.dirname(onnxruntime.__file__), "training", "onnxblock")):
        return onnxruntime, None
    package = types.ModuleType("onnxruntime.training")
    package.__path__ = [os.path.join(os.path.dirname(onnxruntime.__file__), "training")]
    sys.modules["onnxruntime.training"] = package
    onnxruntime.training = package
    from onnxruntime.training import artifacts
    from onnxruntime.training.onnxblock import _training_graph_utils

    _training_graph_utils.SessionOptions = lambda: options(onnxruntime)  # else it logs dozens of lines
    optimise = _training_graph_utils.get_optimized_model

    def optimised_if_possible(model: bytes, *others: Any) -> Any:
        try:
            return optimise(model, *others)
        except RuntimeError:  # its fusions fail on some graphs ("argument mismatch when removing edge")
            return model

    _training_graph_utils.get_optimized_model = optimised_if_possible
    return onnxruntime, artifacts


def options(onnxruntime: Any) -> Any:
    """One quiet thread per session: the shards of a batch are what runs in parallel."""
    chosen = onnxruntime.SessionOptions()
    chosen.intra_op_num_threads = chosen.inter_op_num_threads = 1
    chosen.log_severity_level = 3
    return chosen


def gradient_graph(path: Path) -> tuple[onnx.ModelProto, list[str], dict[str, str]]:
    """The training graph without its accumulators: gradients become outputs.

    Returns the graph, its first outputs (loss and compared values), and the gradient's name for each parameter.
    """
    model = onnx.load(str(path))
    graph = model.graph
    accumulators = [node for node in graph.node if node.op_type == "InPlaceAccumulatorV2"]
    inputs = {value.name: value for value in graph.input}
    outputs = [value for value in graph.output if not value.name.endswith(".accumulation.out")]
    heads, gradients = [value.name for value in outputs], {}
    for node in accumulators:
        value = onnx.ValueInfoProto()
        value.CopyFrom(inputs[node.input[0]])
        value.name = node.input[1]
        outputs.append(value)
        gradients[node.input[1].removesuffix("_grad")] = node.input[1]
    dropped = {node.input[0] for node in accumulators} | {"lazy_reset_grad"}
    for field, kept in (
        (graph.node, [node for node in graph.node if node.op_type != "InPlaceAccumulatorV2"]),
        (graph.output, outputs),
        (graph.input, [value for value in graph.input if value.name not in dropped]),
    ):
        del field[:]
        field.extend(kept)
    return model, heads, gradients


def mask_gradients(graph: onnx.GraphProto) -> None:
    """Gradients of Relu as products with masks, in half of the time: the kernel of ReluGrad isn't vectorised."""
    nodes, zero = [], "onnxprune.zero"
    for node in graph.node:
        if node.op_type != "ReluGrad":
            nodes.append(node)
            continue
        (above, found), (mask, result) = node.input, (f"{node.output[0]}.mask", node.output[0])
        nodes += [
            helper.make_node("Greater", [found, zero], [f"{mask}.bool"]),
            helper.make_node("Cast", [f"{mask}.bool"], [mask], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [above, mask], [result]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.append(numpy_helper.from_array(np.zeros((), np.float32), zero))


def differentiated(folder: Path, artifacts: Any, names: list[str]) -> tuple[onnx.ModelProto, list[str], dict[str, str]]:
    """The gradient graph of `forward.onnx` for these parameters, as `gradient_graph` returns it."""
    scratch = folder / "artifacts"
    scratch.mkdir(exist_ok=True)
    artifacts.generate_artifacts(
        onnx.load(str(folder / "forward.onnx")), requires_grad=names, frozen_params=[], loss=None,
        artifact_directory=str(scratch),
    )  # fmt: skip
    model, heads, gradients = gradient_graph(scratch / "training_model.onnx")
    mask_gradients(model.graph)
    return model, heads, gradients


class Trainer:
    """One training job: its sessions, data, weights and optimizer."""

    def __init__(self, folder: Path, onnxruntime: Any, artifacts: Any) -> None:
        self.folder, self.job = folder, json.loads((folder / "job.json").read_text())
        self.weights = dict(np.load(folder / "weights.npz"))
        if "gradients" in self.job:  # the graph has them already
            self.heads, self.gradients = self.job["heads"], self.job["gradients"]
            self.session = self._session(onnxruntime, str(folder / "backward.onnx"))
        else:
            model, self.heads, self.gradients = differentiated(folder, artifacts, list(self.weights))
            self.session = self._session(onnxruntime, model.SerializeToString())
        self.teacher = self._session(onnxruntime, str(folder / "teacher.onnx")) if self.job["distil"] else None
        self.batches = Batches(self.job)
        self.optimizer = AdamW(self.weights, self.job["weight_decay"], self.job["relative"])
        self.fading = dict(np.load(self.job["fading"])) if self.job["fading"] else {}
        self.average = {name: array.copy() for name, array in self.weights.items()} if self.job["ema"] else {}
        self.best, self.lowest, self.epochs_since, self.spent = dict[str, Array](), math.inf, 0, 0.0
        self.rollbacks, self.peak = 0, self.job["lr"]
        self.pool, self.reader = ThreadPoolExecutor(self.job["threads"]), ThreadPoolExecutor(1)
        self.parent = os.getppid()

    def _session(self, onnxruntime: Any, model: Any) -> Any:
        gpu = [("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"})] if self.job["gpu"] else []
        providers = [*gpu, "CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(model, options(onnxruntime), providers=providers)
        if len(session.get_providers()) < len(providers):
            raise RuntimeError("the CUDA execution provider can't be loaded")
        return session

    def run(self) -> None:
        """Trains from the last checkpoint to the end: of the epochs, of the time, or of the patience.

        The result are the weights after the epoch of the lowest loss on samples that were held out, or those of the
        start. A loss that isn't finite takes training back to a state of at most ten steps before, and on at a quarter
        of the learning rate.
        """
        batches, per_epoch = self.batches, self.batches.per_epoch
        total, start = per_epoch * self.job["epochs"], self._restore()
        began = saved = time.monotonic()
        if self.job["trials"] and len(batches.held):
            self.peak = self._tried_rate(total)
        if not start and len(batches.held):
            self._compare()
            self.epochs_since = 0
        before, safe, progress = self.spent, self._state(), 0.0

        waiting = self.reader.submit(batches.at, start)
        for step in range(start, total):
            epoch, index = divmod(step, per_epoch)
            self.spent = before + time.monotonic() - began
            progress = max(step / total, self.spent / self.job["seconds"] if self.job["seconds"] else 0.0)
            if progress >= 1 or (self.job["stop_after"] and self.epochs_since >= self.job["stop_after"]):
                break
            feeds, waiting = waiting.result(), self.reader.submit(batches.at, min(step + 1, total - 1))
            loss, accuracy = self._step(feeds, batches.size, progress, step)
            if not math.isfinite(loss):
                self._roll_back(safe, step)
            if os.getppid() != self.parent:
                sys.exit(1)  # the run is gone; it resumes from the last checkpoint
            if index + 1 == per_epoch:
                self._compare()
            say(
                event="step", step=step + 1, total=total, epoch=epoch + 1, progress=max(progress, (step + 1) / total),
                loss=loss, accuracy=accuracy,
            )  # fmt: skip
            if (step + 1) % SAFE == 0 or step + 1 == total:
                safe = self._state()
                if time.monotonic() - saved > self.job["checkpoint_seconds"] or step + 1 == total:
                    self._save(step + 1, safe)
                    saved = time.monotonic()
        if not self.best or progress >= 1:
            self._compare()
        write_arrays(self.folder / "result.npz", self.best)
        say(event="done")

    def _tried_rate(self, total: int) -> float:
        """The highest peak rate whose loss on samples held out is near the lowest, after short trainings of each.

        They end as the whole one does, with the rate near zero. From above the usual rate downwards, until two in a row
        were worse than the best. Of rates that are about as good the highest: what is best after a few steps is too
        cautious for many. It is kept for a resumed run.
        """
        path, held = self.folder / "rate.json", self.batches.held
        if path.exists():
            return float(json.loads(path.read_text()))
        steps = min(total, max(LEAST_TRIAL, min(MOST_TRIAL, total // TRIAL_SHARE)))
        began, start, losses = time.monotonic(), self._state(), dict[float, float]()
        for factor in TRIED:
            losses[factor] = self._trial(factor * self.job["lr"], steps)
            self._set(start)
            best = min(losses, key=losses.__getitem__)
            spent = (time.monotonic() - began) / (self.job["seconds"] or math.inf)
            if len(losses) > list(losses).index(best) + 2 or spent > TRIAL_TIME:
                break
        near = [factor for factor, loss in losses.items() if loss <= NEAR_BEST * losses[best]]
        rate = max(near, default=best) * float(self.job["lr"])
        said = ", ".join(f"{factor * self.job['lr']:.2g}: {loss:.4g}" for factor, loss in losses.items())
        say(
            event="note",
            message=f"learning rate {rate:.2g}, by the loss on {len(held)} samples after {steps} steps ({said})",
        )
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(rate))
        temporary.replace(path)
        return rate

    def _trial(self, rate: float, steps: int) -> float:
        """The loss on samples held out after a short training at this peak rate; infinite where it isn't finite."""
        self.peak = rate
        for step in range(steps):
            loss, _ = self._step(self.batches.at(step), self.batches.size, step / steps, step, fade=False)
            if not math.isfinite(loss):
                return math.inf
            say(event="trial")
        loss = self._held_loss(self.weights)
        return float(loss) if math.isfinite(loss) else math.inf

    def _held_loss(self, weights: dict[str, Array]) -> float:
        """The loss on samples that were held out; minus infinity where none are."""
        held, size, losses = self.batches.held, self.job["batch"], list[float]()
        parts = [held[i : i + size] for i in range(0, len(held), size)]
        for rows in parts:
            losses.append(len(rows) * self._gradients(self.batches.take(rows), len(rows), weights)[0])
        return float(np.sum(losses)) / len(held) if losses else -math.inf

    def _compare(self) -> None:
        """Remembers the weights, or their average, if their loss on samples that were held out is the lowest so far."""
        weights = self.average or self.weights
        loss = self._held_loss(weights)  # the last ones, when nothing is held out
        self.epochs_since += 1
        if not self.best or loss <= self.lowest:
            self.best, self.lowest = {name: array.copy() for name, array in weights.items()}, loss
            self.epochs_since = 0

    def _roll_back(self, safe: dict[str, Array], step: int) -> None:
        """Goes back to a state that was sound. Raises `FloatingPointError` where that was done twice already."""
        if self.rollbacks == ROLLBACKS:
            raise FloatingPointError(
                f"the loss wasn't finite at step {step + 1}, nor at an earlier one, however small the learning rate; "
                "lower --lr"
            )
        done, kept = self.rollbacks + 1, (self.lowest, self.epochs_since, self.spent)
        self._set(safe)
        self.rollbacks, (self.lowest, self.epochs_since, self.spent) = done, kept
        say(event="note", message=f"the loss wasn't finite at step {step + 1}: back, at {SLOWER**done:g} of the rate")

    def measure(self) -> None:
        """The mean and the mean square of each parameter's gradient over batches; nothing is trained."""
        samples = len(next(iter(self.batches.data.values())))
        size = min(self.job["batch"], samples)
        moments = {name: np.zeros((2, *array.shape), np.float32) for name, array in self.weights.items()}
        count = samples // size
        for step in range(count):
            chosen = np.arange(step * size, (step + 1) * size)
            _, _, gradients = self._gradients(self.batches.take(chosen), len(chosen), self.weights)
            for name, gradient in gradients.items():
                moments[name] += np.stack([gradient, np.square(gradient)]) / np.float32(count)
            say(event="step", step=step + 1, total=count)
        write_arrays(self.folder / "result.npz", moments)
        say(event="done")

    def _gradients(
        self, feeds: dict[str, Array], size: int, weights: dict[str, Array]
    ) -> tuple[float, list[Array], dict[str, Array]]:
        """The loss of a batch, what is compared with the teacher by shard, and each parameter's gradient."""
        shards = np.array_split(np.arange(size), max(1, math.ceil(size / self.job["shard"])))
        fetched = [self.heads[0], *self.heads[1:2], *self.gradients.values()]

        def run(rows: Array) -> list[Array]:
            shard = {name: array[rows] for name, array in feeds.items()}
            if self.teacher is not None:
                inputs = {name: shard[name] for name in self.batches.data}
                for i, output in enumerate(self.teacher.run(None, inputs)):
                    shard[f"onnxprune.teacher.{i}"] = output
            wanted = {value.name for value in self.session.get_inputs()}
            return list(self.session.run(fetched, {k: v for k, v in {**weights, **shard}.items() if k in wanted}))

        results = list(self.pool.map(run, shards))
        shares = [np.float32(len(rows) / size) for rows in shards]
        loss = float(sum(share * float(result[0]) for share, result in zip(shares, results, strict=True)))
        skip = 1 + len(self.heads[1:2])
        gradients = {
            name: np.sum([share * result[skip + i] for share, result in zip(shares, results, strict=True)], axis=0)
            for i, name in enumerate(self.gradients)
        }
        return loss, [result[1] for result in results if len(result) > 1], gradients

    def _step(
        self, feeds: dict[str, Array], size: int, progress: float, step: int, fade: bool = True
    ) -> tuple[float, float | None]:
        loss, scores, gradients = self._gradients(feeds, size, self.weights)
        norm = math.sqrt(sum(float(np.square(g, dtype=np.float64).sum()) for g in gradients.values()))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return math.nan, None
        scale = np.float32(min(1.0, self.job["clip"] / max(norm, 1e-12)))
        rate = learning_rate(progress, self.peak) * SLOWER**self.rollbacks
        self.optimizer.step({name: g * scale for name, g in gradients.items()}, rate)
        if progress > 0 and fade:
            left = np.float32(FADED ** (2 * progress * progress / max(step, 1)))  # the product of all is FADED
            for name, where in self.fading.items():
                self.weights[name][where] *= left
        for name, array in self.average.items():
            array += np.float32(1 - self.job["ema"]) * (self.weights[name] - array)
        return loss, self._accuracy(feeds, scores)

    def _accuracy(self, feeds: dict[str, Array], scores: list[Array]) -> float | None:
        labels = feeds.get("onnxprune.labels")
        if labels is None or labels.dtype.kind == "f" or labels.ndim != 1:
            return None
        return float((np.concatenate(scores).argmax(-1) == labels).mean())

    def _state(self) -> dict[str, Array]:
        """A copy of everything that changes, by name."""
        kinds = {"w": self.weights, "m": self.optimizer.first, "v": self.optimizer.second, "a": self.average}
        arrays = {f"{kind}:{name}": array.copy() for kind, held in kinds.items() for name, array in held.items()}
        counts = np.array([self.optimizer.step_count, self.rollbacks, self.epochs_since])
        return {**arrays, "counts": counts, "measures": np.array([self.lowest, self.spent])}

    def _set(self, state: dict[str, Array]) -> None:
        kinds = {"w": self.weights, "m": self.optimizer.first, "v": self.optimizer.second, "a": self.average}
        for kind, held in kinds.items():
            for name, array in held.items():
                array[...] = state[f"{kind}:{name}"]
        self.optimizer.step_count, self.rollbacks, self.epochs_since = (int(x) for x in state["counts"])
        self.lowest, self.spent = (float(x) for x in state["measures"])

    def _save(self, step: int, state: dict[str, Array]) -> None:
        best = {f"b:{name}": array for name, array in self.best.items()}
        write_arrays(self.folder / "checkpoint.npz", {**state, **best, "step": np.array(step)})

    def _restore(self) -> int:
        path = self.folder / "checkpoint.npz"
        if not path.exists():
            return 0
        with np.load(path) as state:
            self._set(state)
            self.best = {name: state[f"b:{name}"] for name in self.weights if f"b:{name}" in state}
            return int(state["step"])


def write_arrays(path: Path, arrays: dict[str, Array]) -> None:
    """An .npz that appears whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def limit_memory(limit: int | None) -> None:
    """Caps what this process may map beyond what it has mapped so far, in bytes, where the system can."""
    if limit:
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + limit, mapped + limit))


def main() -> None:
    """Runs the job; every failure is reported as an event, with its kind."""
    folder = Path(sys.argv[1]).resolve()
    os.chdir(folder)  # the artifact generator deletes a temp.onnx in the current folder
    kind = "failure"
    try:
        modules = import_runtime()
        limit_memory(json.loads((folder / "job.json").read_text())["memory_limit"])
        trainer = Trainer(folder, *modules)
        (trainer.measure if trainer.job["task"] == "gradients" else trainer.run)()
        return
    except FloatingPointError as error:
        kind, message = "not-finite", str(error)
    except MemoryError:
        kind, message = "memory", "out of memory"
    except OSError as error:
        kind, message = "disk", str(error)
    except Exception as error:  # whatever the runtime raises: reported, never a traceback
        message = f"{type(error).__name__}: {str(error).strip()[:500]}"
        if any(sign in message.lower() for sign in ("allocate", "bad_alloc", "can't start new thread")):
            kind = "memory"
    say(event="error", kind=kind, message=message)
    sys.exit(1)


if __name__ == "__main__":
    main()
