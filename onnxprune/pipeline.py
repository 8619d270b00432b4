"""The round loop: load, normalise, analyse, score, threshold, cut, repair, fine-tune, evaluate, accept or roll back.

Every step that takes long leaves its result in the run folder, and every decision is a pure function of those results.
Resuming is running again: what is there isn't computed twice.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.bench import BenchResult, bench_models, find_providers, model_bytes
from onnxprune.cost import Alive, Cost
from onnxprune.cut import cut
from onnxprune.data import Dataset, ImageOptions, as_dataset, random_dataset
from onnxprune.errors import ModelError, OnnxPruneError, TrainingError, UsageError
from onnxprune.evaluate import METRICS, Metric, find_metric, log_probabilities, predict
from onnxprune.files import check_writable, memoised, sha256, write_json
from onnxprune.finalise import finalise
from onnxprune.labels import analyse
from onnxprune.labels.flow import integer
from onnxprune.labels.solve import Granularity
from onnxprune.model import open_model, save_model
from onnxprune.normalise import normalise
from onnxprune.plan import Plan, load_plan
from onnxprune.progress import Listener
from onnxprune.report import Report, Side, Width, latency_sides
from onnxprune.repair import reestimate_batch_norm
from onnxprune.score import Scope, normalise_scores, score_units
from onnxprune.select import Rounding, survivors, tau_for
from onnxprune.threshold import LEAST_GAIN, PATIENCE, Outcome, bisect_tau, initial_tau, next_progress, published_tau, reach
from onnxprune.training import TrainingOptions, fine_tune
from onnxprune.training.client import choose_augmentation
from onnxprune.units import Units, find_units
from onnxprune.verify import mask_oracle

HELD_BACK = 0.2  # of the data, for decisions, when no evaluation data is given
PROBE_SAMPLES = 1024
STEPS_A_ROUND = 1000  # fine-tuning steps that epochs are chosen for when they aren't given
WITHOUT_DATA = 0.75  # share of MACs to keep when nothing can be measured
ROUNDS = 4  # when not given, for runs that an allowed drop alone ends
RESOURCES = ("macs", "params", "size")
ORACLE_TOLERANCE = 1e-4

Data = str | Mapping[str, NDArray[Any]]
Controller = Literal["bisect", "published"]


@dataclass(frozen=True)
class RunOptions:
    """What a run is asked to do; everything that decides its result besides the model and the data."""

    target_macs: float | None = None
    target_params: float | None = None
    target_size: float | None = None
    max_drop: float | None = None
    rounds: int | None = None
    epochs: int | None = None
    lr: float = 1e-3
    criterion: str = "l2"
    scope: Scope = "global"
    granularity: Granularity = "auto"
    round_to: int | None = None
    metric: str | None = None
    controller: Controller = "bisect"
    providers: tuple[str, ...] = ("cpu",)
    threads: int | None = None
    seed: int = 0
    distillation: float = 0.5
    batch: int = 64
    bench_seconds: float = 4.0

    def __post_init__(self) -> None:
        for name, value in self.targets().items():
            if not 0 < value < 1:
                raise UsageError(f"--target-{name} {value:g}: give the share that may remain, between 0 and 1")
        if self.max_drop is not None and self.max_drop < 0:
            raise UsageError(f"--max-drop {self.max_drop:g}: give the points that may be lost, 0 or more")
        for name in ("rounds", "round_to", "threads", "batch"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UsageError(f"--{name.replace('_', '-')} {number}: give 1 or more")
        if self.epochs is not None and self.epochs < 0:
            raise UsageError(f"--epochs {self.epochs}: give 0 or more")
        if not self.lr > 0:
            raise UsageError(f"--lr {self.lr:g}: give a learning rate above 0")

    def targets(self) -> dict[str, float]:
        """The shares asked for, by resource."""
        given = {name: getattr(self, f"target_{name}") for name in RESOURCES}
        return {name: value for name, value in given.items() if value is not None}


def run(
    model: str | os.PathLike[str],
    data: Data | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    eval_data: Data | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    images: ImageOptions | None = None,
    options: RunOptions | None = None,
    listener: Listener | None = None,
) -> Report:
    """Prunes, repairs, fine-tunes, checks and benchmarks a model, and writes the result to `output`.

    `data` and `eval_data` are paths, `module:function`, or dicts of arrays (see `load_data`). The best accepted model
    is written even when the targets aren't met: `Report.met` tells. Raises a subclass of `OnnxPruneError` for a model,
    data or options that can't be used; `KeyboardInterrupt` leaves the best accepted model at `output`.
    """
    options, listener = options or RunOptions(), listener or Listener()
    source = Path(model)
    target = Path(output) if output is not None else source.with_suffix(".pruned.onnx")
    check_writable(target)
    if target.exists() and source.exists() and target.samefile(source):
        raise UsageError(f"the output {target} is the input; choose another -o")
    find_providers(options.providers)
    folder = Path(run_dir) if run_dir is not None else target.with_suffix(".onnxprune")
    session = Run(source, target, folder, data, eval_data, images, options, listener, resume)
    return session.execute()


class Run:
    """One run in its folder. Attributes are computed when first needed; the folder remembers what took long."""

    def __init__(
        self,
        source: Path,
        output: Path,
        folder: Path,
        data: Data | None,
        eval_data: Data | None,
        images: ImageOptions | None,
        options: RunOptions,
        listener: Listener,
        resume: bool,
    ) -> None:
        self.source, self.output, self.folder = source, output, folder
        self.options, self.listener = options, listener
        self.started = time.monotonic()
        self.notes: list[str] = []
        listener.stage("opening and normalising the model")
        self.baseline = normalise(open_model(source))
        self._load_data(data, eval_data, images)
        self._open_folder(resume)

    # ---- opening

    def _load_data(self, data: Data | None, eval_data: Data | None, images: ImageOptions | None) -> None:
        self.train: Dataset | None = None if data is None else as_dataset(data, self.baseline, images)
        evaluation = None if eval_data is None else as_dataset(eval_data, self.baseline, images)
        if self.train is None and evaluation is None:
            if self.options.max_drop is not None or self.options.metric is not None:
                raise UsageError("--max-drop and --metric need data to measure on: give --data")
            self.evaluation = random_dataset(self.baseline, 64, self.options.seed)
            self.note("no data: pruned by weights alone; accuracy was not measured, fidelity is on random inputs")
        elif evaluation is not None:
            self.evaluation = evaluation
        else:
            assert self.train is not None
            self.train, self.evaluation = self.train.split(HELD_BACK, self.options.seed)
            self.note(
                f"no evaluation data: {len(self.evaluation)} samples of --data are held back from training for decisions"
            )
        self.measured = self.train is not None or evaluation is not None
        self.metric: Metric = find_metric(self.options.metric, self.evaluation)

    def _open_folder(self, resume: bool) -> None:
        config = {
            "model_sha256": sha256(self.source),
            "data": self.train.digest() if self.train is not None else None,
            "evaluation": self.evaluation.digest(),
            "options": json.loads(json.dumps(asdict(self.options))),
        }
        marker = self.folder / "config.json"
        if resume:
            if not marker.exists():
                raise UsageError(f"{self.folder} holds no run to resume; leave out --resume, or name it with --run-dir")
            before = json.loads(marker.read_text())
            changed = [name for name in config if before.get(name) != config[name]]
            if changed:
                raise UsageError(
                    f"{self.folder} is a run with another {' and '.join(changed)}; repeat the same command to resume it"
                )
            return
        if self.folder.exists():
            if any(self.folder.iterdir()) and not marker.exists():
                raise UsageError(f"{self.folder} is not empty and not a run folder; choose another --run-dir")
            shutil.rmtree(self.folder)
        try:
            self.folder.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"can't create {self.folder}: {error.strerror}; choose another --run-dir") from error
        save_model(self.baseline, self.folder / "baseline.onnx")
        write_json(marker, config)

    def note(self, text: str) -> None:
        """Something the user should know; it stands in the report too."""
        self.notes.append(text)
        self.listener.note(text)

    # ---- what is measured

    @cached_property
    def reference(self) -> list[NDArray[Any]]:
        """The uncut model's outputs on the evaluation data."""
        return predict(self.baseline, self.evaluation, self.options.threads)

    @cached_property
    def base_metric(self) -> float:
        """The uncut model's metric."""
        return self.metric.compute(self.reference, self.evaluation.labels, self.reference)

    @cached_property
    def base_cost(self) -> dict[str, int]:
        """MACs, parameters and bytes of the uncut model."""
        return self._costs(self.baseline_units, np.ones(self.baseline_units.count, bool))

    @cached_property
    def baseline_units(self) -> Units:
        """The prunable units of the uncut model. Raises `ModelError` when there are none."""
        units = find_units(analyse(self.baseline, self.options.granularity))
        if not any(len(group.units) > 1 for group in units.groups):
            reasons = sorted({lock.reason for lock in units.solution.lock_reasons().values()})
            raise ModelError(
                f"{self.source}: nothing can be pruned: {'; '.join(reasons[:4]) or 'no channels'}. "
                "'onnxprune inspect' lists what is locked and why"
            )
        return units

    @cached_property
    def augmentation(self) -> dict[str, Any]:
        """The image augmentations that the uncut model itself is indifferent to."""
        if self.train is None:
            return {}
        return choose_augmentation(self.baseline, self.train, self.options.threads)

    @staticmethod
    def _costs(units: Units, alive: Alive) -> dict[str, int]:
        cost = Cost(units)
        return {"macs": cost.macs(alive), "params": cost.params(alive), "size": cost.bytes(alive)}

    @cached_property
    def targets(self) -> dict[str, float]:
        """The shares that may remain, by resource; empty when the allowed drop alone decides."""
        return self.options.targets() or ({} if self.measured else {"macs": WITHOUT_DATA})

    def _progress(self, costs: dict[str, int]) -> float:
        """How far costs are on the way to the targets: 1 when all are met, on a logarithmic scale."""
        done = [
            np.log(max(costs[name], 1) / self.base_cost[name]) / np.log(target) for name, target in self.targets.items()
        ]
        return float(np.clip(min(done, default=0.0), 0, 1))

    def _drop(self, model: ir.Model, limit: int | None = None) -> tuple[float, float, float]:
        """(metric, points lost, loss) of a model on the evaluation data, or on its first `limit` samples."""
        part = self.evaluation if limit is None else self.evaluation.take(slice(0, limit))
        reference = self.reference if limit is None else [array[:limit] for array in self.reference]
        outputs = predict(model, part, self.options.threads)
        base = self.metric.compute(reference, part.labels, reference)
        value = self.metric.compute(outputs, part.labels, reference)
        return value, self.metric.drop(base, value), loss_of(outputs, part.labels, reference)

    @property
    def epochs(self) -> int:
        """Epochs of fine-tuning in each round."""
        if self.train is None:
            return 0
        if self.options.epochs is not None:
            return self.options.epochs
        return int(np.clip(round(STEPS_A_ROUND * self.options.batch / len(self.train)), 2, 60))

    @property
    def allowed(self) -> float | None:
        """Points that may be lost; one when nothing at all was asked for and there is data."""
        if self.options.max_drop is None and not self.options.targets() and self.measured:
            return 1.0
        return self.options.max_drop

    # ---- the loop

    def execute(self) -> Report:
        """Runs all rounds, finalises, benchmarks and reports."""
        self.listener.stage("measuring the uncut model")
        _ = self.baseline_units, self.base_metric, self.augmentation
        current, plan, history = self.baseline, Plan({}), list[Outcome]()
        records: list[dict[str, Any]] = []
        failure: TrainingError | None = None
        try:
            for number in range(1, (self.options.rounds or ROUNDS) + PATIENCE + 2):
                folder = self.folder / f"round-{number:02d}"
                proposal = self._propose(current, history, folder)
                if proposal is None:
                    break
                try:
                    record, current, plan = self._round(number, folder, current, plan, history, proposal)
                except TrainingError as error:
                    failure = error
                    record = self._failed(folder, proposal, error)
                    self.note(f"round {number} ended: {error}")
                records.append(record)
                history.append(Outcome(**{name: record[name] for name in ("tau", "drop", "loss", "accepted", "progress")}))
        except KeyboardInterrupt:
            self._write(current, plan)
            self.listener.note(f"interrupted: the best accepted model is in {self.output}; --resume goes on from here")
            raise
        if failure is not None and not any(outcome.accepted for outcome in history):
            raise failure
        return self._report(current, plan, records)

    def _propose(self, current: ir.Model, history: list[Outcome], folder: Path) -> dict[str, Any] | None:
        """The cut that the next round tries: its threshold and survivors; None when the run is done."""
        rounds = self.options.rounds
        if self.targets:
            aim = next_progress(rounds or 1, history)
            if aim is None:
                return None
            return memoised(folder_file(folder, "proposal.json"), lambda: self._cut_to(current, aim))  # type: ignore[no-any-return]
        failures = [outcome for outcome in history if not outcome.accepted]
        if len(history) >= (rounds or ROUNDS) or len(failures) > PATIENCE:
            return None
        found = memoised(folder_file(folder, "proposal.json"), lambda: self._cut_within(current, history))
        return found if found["tau"] is not None else None

    def _cut_to(self, current: ir.Model, aim: float) -> dict[str, Any]:
        """The lowest threshold that brings every targeted resource `aim` of the way to its share."""
        units, scores, rounding = self._scored(current)
        cost = Cost(units)
        limits = {name: target**aim * self.base_cost[name] for name, target in self.targets.items()}

        def fits(alive: Alive) -> bool:
            found = {"macs": cost.macs, "params": cost.params, "size": cost.bytes}
            return all(found[name](alive) <= limit for name, limit in limits.items())

        self.listener.stage("choosing a threshold")
        for attempt in (rounding, Rounding(1)):  # where whole blocks can't meet the target, ragged widths may
            if (chosen := tau_for(units, scores, attempt, fits)) is not None:
                return {"tau": chosen[0], "round_to": attempt.multiple, "progress": aim}
        self.note("the target is out of reach: cut as far as every layer keeps one channel")
        highest = float(np.nextafter(scores[np.isfinite(scores)].max(), np.inf))
        return {"tau": highest, "round_to": 1, "progress": 1.0}

    def _cut_within(self, current: ir.Model, history: list[Outcome]) -> dict[str, Any]:
        """A threshold whose cut costs no more, after repair, than fine-tuning can be hoped to win back."""
        units, scores, rounding = self._scored(current)
        allowed = self.allowed or 0.0
        if self.options.controller == "published":
            last = history[-1] if history else None
            tau = initial_tau(scores) if last is None else published_tau(last.tau, last.loss, allowed)
            return {"tau": tau * 0.5 ** sum(not o.accepted for o in history), "round_to": rounding.multiple}
        now = self._drop(current, PROBE_SAMPLES)[1]
        budget = reach(history, allowed, self.epochs > 0) + min(now, 0.0)
        tried = 0

        def drop_at(tau: float) -> float:
            nonlocal tried
            tried += 1
            self.listener.progress("choosing a threshold", tried, 8)
            model, _ = cut(units, survivors(units, scores, tau, rounding))
            self._repair(model)
            return self._drop(model, PROBE_SAMPLES)[1]

        tau = bisect_tau(scores, drop_at, max(budget, allowed))
        if tau is not None:
            cost = Cost(units)
            before, after = cost.macs(np.ones(units.count, bool)), cost.macs(survivors(units, scores, tau, rounding))
            if after > before * (1 - LEAST_GAIN):
                return {"tau": None, "round_to": None}
        return {"tau": tau, "round_to": rounding.multiple}

    def _scored(self, model: ir.Model) -> tuple[Units, NDArray[np.float64], Rounding]:
        units = find_units(analyse(model, self.options.granularity))
        raw = score_units(units, self.options.criterion, self.options.seed)
        return units, normalise_scores(units, raw, self.options.scope), Rounding(self.options.round_to)

    def _round(
        self, number: int, folder: Path, current: ir.Model, plan: Plan, history: list[Outcome], proposal: dict[str, Any]
    ) -> tuple[dict[str, Any], ir.Model, Plan]:
        """Cuts, repairs, fine-tunes, evaluates; returns the record, and the model and plan that are accepted after it."""
        done = folder / "round.json"
        if not done.exists():
            record, model, after = self._attempt(number, folder, current, plan, proposal)
            save_model(model, folder / "candidate.onnx")
            write_json(folder / "plan.json", after.to_json(sha256(self.folder / "baseline.onnx")))
            write_json(done, record)
            shutil.rmtree(folder / "tune", ignore_errors=True)
        record = json.loads(done.read_text())
        verdict = "kept" if record["accepted"] else "rolled back"
        self.listener.note(
            f"round {number}: {100 * record['macs_share']:.0f} % of the MACs left, {self.metric.name} {record['metric']:.2f} "
            f"({-record['drop']:+.2f}): {verdict}"
        )
        if not record["accepted"]:
            return record, current, plan
        return record, open_model(folder / "candidate.onnx"), load_plan(folder / "plan.json")

    def _attempt(
        self, number: int, folder: Path, current: ir.Model, plan: Plan, proposal: dict[str, Any]
    ) -> tuple[dict[str, Any], ir.Model, Plan]:
        started = time.monotonic()
        units, scores, _ = self._scored(current)
        alive = survivors(units, scores, proposal["tau"], Rounding(proposal["round_to"]))
        costs = self._costs(units, alive)
        self.listener.stage(f"round {number}: cutting")
        model, step = cut(units, alive)
        check_cut(current, model, step)
        self._repair(model)
        repaired = self._drop(model)
        if self.epochs and self.train is not None:
            self._tune(number, folder, model)
            self._repair(model)
        value, drop, loss = self._drop(model) if self.epochs else repaired
        allowed = self.allowed
        record = {
            "round": number,
            "tau": proposal["tau"],
            "progress": self._progress(costs),
            "macs_share": costs["macs"] / max(self.base_cost["macs"], 1),
            **costs,
            "metric_before_tuning": repaired[0],
            "metric": value,
            "drop": drop,
            "loss": loss,
            "epochs": self.epochs,
            "accepted": allowed is None or drop <= allowed,
            "widths": {g.name: int(alive[g.units].sum()) * g.repeats for g in units.groups},
            "seconds": time.monotonic() - started,
        }
        return record, model, plan.then(step)

    def _tune(self, number: int, folder: Path, model: ir.Model) -> None:
        assert self.train is not None
        threads = self.options.threads or os.cpu_count() or 1
        options = TrainingOptions(
            epochs=self.epochs,
            lr=self.options.lr,
            batch=self.options.batch,
            distillation=self.options.distillation,
            threads=threads,
            seed=self.options.seed + number,
        )

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "note":
                self.listener.note(event["message"])
                return
            accuracy = f", accuracy {100 * event['accuracy']:.0f} %" if event["accuracy"] is not None else ""
            text = f"round {number}: fine-tuning, epoch {event['epoch']}/{self.epochs}, loss {event['loss']:.3f}{accuracy}"
            self.listener.progress(text, event["step"], event["total"])

        fine_tune(model, self.baseline, self.train, folder / "tune", options, self.augmentation, show)

    def _repair(self, model: ir.Model) -> None:
        if self.train is not None:
            reestimate_batch_norm(model, self.train, self.options.threads)

    def _failed(self, folder: Path, proposal: dict[str, Any], error: TrainingError) -> dict[str, Any]:
        shutil.rmtree(folder / "tune", ignore_errors=True)
        record = {
            "tau": proposal["tau"], "progress": proposal.get("progress", 0.0), "drop": float("inf"), "loss": float("inf"), "metric": None,
            "accepted": False, "error": str(error),
        }  # fmt: skip
        return record

    # ---- the end

    def _write(self, model: ir.Model, plan: Plan) -> Path:
        """Writes the accepted model and its plan, to the run folder and to the output."""
        pruned = self.folder / "pruned.onnx"
        save_model(finalise(model), pruned)
        write_json(self.folder / "plan.json", plan.to_json(sha256(self.folder / "baseline.onnx")))
        save_model(open_model(pruned), self.output)
        return pruned

    def _report(self, model: ir.Model, plan: Plan, records: list[dict[str, Any]]) -> Report:
        self.listener.stage("saving and checking the result")
        self._write(model, plan)
        final = open_model(self.output)
        self.listener.stage("benchmarking before against after")
        results = self._benchmark()
        latencies, speedup = latency_sides(results)
        memory = [{r.provider: r.memory_bytes for r in results if r.model == str(p)} for p in (self.source, self.output)]
        units = find_units(analyse(model, self.options.granularity))
        costs = self._costs(units, np.ones(units.count, bool))
        sides = []
        for path, subject, cost, latency, used in (
            (self.source, self.baseline, self.base_cost, latencies[0], memory[0]),
            (self.output, final, costs, latencies[-1], memory[1]),
        ):
            outputs = predict(subject, self.evaluation, self.options.threads)
            value = self.metric.compute(outputs, self.evaluation.labels, self.reference)
            fidelity = {"cosine": METRICS["cosine"].compute(outputs, None, self.reference)}
            metric = {"name": self.metric.name, "value": value} if self.measured else None
            sides.append(
                Side(str(path), cost["macs"], cost["params"], model_bytes(path), metric, fidelity, latency, used)
            )
        report = Report(
            sides[0], sides[1], tuple(records), widths(self.baseline, model), self._target(costs, sides), speedup,
            tuple(self.notes), str(self.folder), asdict(self.options), versions(), sha256(self.source),
            time.monotonic() - self.started,
        )  # fmt: skip
        write_json(self.folder / "report.json", report.to_json())
        return report

    def _benchmark(self) -> list[BenchResult]:
        return bench_models(
            [self.source, self.output], self.options.providers, self.options.threads, seconds=self.options.bench_seconds
        )

    def _target(self, costs: dict[str, int], sides: list[Side]) -> dict[str, Any]:
        """What was asked, what was reached, and whether that is enough."""
        asked = {
            name: {"asked": share, "reached": costs[name] / max(self.base_cost[name], 1)}
            for name, share in self.targets.items()
        }
        met = all(entry["reached"] <= entry["asked"] for entry in asked.values())
        drop = None
        if self.measured and sides[0].metric is not None and sides[1].metric is not None:
            drop = self.metric.drop(sides[0].metric["value"], sides[1].metric["value"])
        if self.allowed is not None and drop is not None:
            met = met and drop <= self.allowed + 1e-9
            if not asked:
                met = met and costs["macs"] < self.base_cost["macs"]
        return {"resources": asked, "max_drop": self.allowed, "drop": drop, "met": met}


def folder_file(folder: Path, name: str) -> Path:
    """A file in a folder that is made when it isn't there."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name


def check_cut(before: ir.Model, after: ir.Model, step: Plan) -> None:
    """Raises `ModelError` when a cut doesn't run, or an exact one differs from the mask oracle: nothing is written."""
    result = mask_oracle(before, after, step, seeds=(0,))
    if step.exact and not result.difference <= ORACLE_TOLERANCE:
        raise ModelError(
            f"the cut model differs from the masked one by {result.difference:.1e}, which is a fault of onnxprune: "
            "nothing was written; please report the model"
        )


def loss_of(outputs: list[NDArray[Any]], labels: NDArray[Any] | None, reference: list[NDArray[Any]]) -> float:
    """Cross-entropy on class labels in nats, mean square error on float labels, else one minus the cosine."""
    scores = outputs[0]
    if labels is None or labels.size != scores.size // scores.shape[-1] or labels.dtype.kind == "f":
        if labels is not None and labels.size == scores.size:
            return float(np.mean(np.square(scores.ravel() - labels.ravel())))
        return 1 - METRICS["cosine"].compute(outputs, None, reference) / 100
    rows = log_probabilities(scores.astype(np.float64).reshape(-1, scores.shape[-1]))
    return float(-np.take_along_axis(rows, labels.reshape(-1, 1).astype(np.int64), 1).mean())


WIDTH_AT = {  # operator -> (input, axis) whose size is the width of the layer
    "Conv": (1, 0), "ConvTranspose": (1, 1), "Gemm": (1, 1), "MatMul": (1, -1), "GRU": (2, 2), "LSTM": (2, 2), "RNN": (2, 2),
}  # fmt: skip


def widths(before: ir.Model, after: ir.Model) -> tuple[Width, ...]:
    """Output channels of every convolution, matrix product and recurrent layer with a weight, before and after."""
    found = []
    later = {node.name: node for node in after.graph}
    for node in before.graph:
        if node.op_type not in WIDTH_AT or node.name not in later:
            continue
        index, axis = WIDTH_AT[node.op_type]
        if node.op_type == "Gemm" and integer(node, "transB", 0):
            axis = 0
        sizes = [n.inputs[index] for n in (node, later[node.name])]
        if all(v is not None and v.const_value is not None for v in sizes):
            a, b = (v.const_value.shape.numpy()[axis] for v in sizes)  # type: ignore[union-attr]
            found.append(Width(node.name or "", node.op_type, int(a), int(b)))
    return tuple(found)


def versions() -> dict[str, str]:
    """What a run depends on."""
    names = ("onnxprune", "onnx", "onnx-ir", "onnxruntime", "onnxsim", "numpy")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


__all__ = ["OnnxPruneError", "RunOptions", "run"]
