"""The round loop: load, normalise, analyse, score, threshold, cut, repair, fine-tune, evaluate, accept or roll back.

Every step that takes long leaves its result in the run folder, and every decision is a pure function of those results.
Resuming is running again: what is there isn't computed twice.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.activations import ACTIVATION_CRITERIA
from onnxprune.bench import bench_models, find_providers, model_bytes
from onnxprune.cost import Alive, Cost
from onnxprune.cut import cut
from onnxprune.data import Dataset, random_dataset
from onnxprune.errors import ModelError, TrainingError, UsageError
from onnxprune.evaluate import find_metric
from onnxprune.files import check_writable, memoised, sha256, write_json
from onnxprune.finalise import finalise
from onnxprune.gradients import GRADIENT_CRITERIA
from onnxprune.judge import Judge, Verdict
from onnxprune.labels import analyse
from onnxprune.latency import CORRECTIONS, correct, time_share
from onnxprune.layers import Layer, choose_layers, drop_layers, free_layers, influence_scores, weight_scores
from onnxprune.lineup import line_up
from onnxprune.model import open_model, save_model
from onnxprune.normalise import normalise
from onnxprune.options import RESOURCES, RunOptions
from onnxprune.plan import Plan, Reordering, load_plan
from onnxprune.probe import CPU, Probe, probe
from onnxprune.progress import Listener
from onnxprune.quantise import Numbers, quantise
from onnxprune.reconstruct import reconstruct
from onnxprune.repair import reestimate_batch_norm, undo_if_worse
from onnxprune.report import Report, Side, latency_sides, versions, widths
from onnxprune.score import CRITERIA, Origin, normalise_scores, origin_of, score_units
from onnxprune.select import Rounding, bounded, survivors, tau_for
from onnxprune.sensitivity import load_sensitivity
from onnxprune.sources import ImageOptions, as_dataset
from onnxprune.synthesise import synthetic_dataset
from onnxprune.threshold import (
    EVALUATIONS,
    LEAST_GAIN,
    PATIENCE,
    Outcome,
    bisect_tau,
    initial_tau,
    next_progress,
    published_tau,
    reach,
)
from onnxprune.training import TrainingOptions, fine_tune, prepare_trainer
from onnxprune.training.client import choose_augmentation
from onnxprune.training.losses import plan_loss
from onnxprune.training.worker import write_arrays
from onnxprune.units import Units, chosen_units, fading_parts, find_units, granularity_for, prunable
from onnxprune.verify import check_cut
from onnxprune.workspace import configuration, open_workspace

HELD_BACK = 0.2  # share of the samples for decisions, when no evaluation data is given, but at most
MOST_HELD, MOST_MEASURED = 5000, 1000  # where the drop decides, and where it is only measured
PROBE_SAMPLES = 1024
STEPS_A_ROUND = 1000  # fine-tuning steps that epochs are chosen for when they aren't given
ENDLESS = 10_000  # epochs, where time decides
WITHOUT_DATA = 0.75  # share of the MACs to keep when nothing can be measured
ROUNDS = 4  # when not given, for runs that an allowed drop alone ends

DATA_CRITERIA = {**ACTIVATION_CRITERIA, **GRADIENT_CRITERIA}
AUTO, LINED_UP_BY = "auto", "l2"  # rows are sorted before the contest, by one criterion
CONTESTANTS = ("l2", "l1", "logistic", "fpgm", "bn", "flap", "obs")
TRIED_AT = {"macs": 0.5}  # where an allowed drop alone decides
OVER = 1.05  # times the time asked that still counts as met
UNKNOWN = 1e30  # a loss that JSON can hold

MEASURED = ("drop", "loss", "drop_before_tuning")
RATE, RATE_WITH_BATCH_NORM = 1e-3, 1.5e-3  # of AdamW, when not given

Data = str | Sequence[str] | Mapping[str, NDArray[Any]]
Proposal = dict[str, Any]
Record = dict[str, Any]


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
    notes: list[str] = []
    listener.stage("opening and normalising the model")
    baseline = normalise(open_model(source))
    units = prunable(baseline, str(source), options.granularity, options.kinds, options.protect)
    moved = line_up(units, options.criterion if options.criterion in CRITERIA else LINED_UP_BY, options.seed)
    if options.quantize == "int8" and data is None:
        raise UsageError("--quantize int8 takes ranges from data: give --data, or use --quantize dynamic")
    train, evaluation = _load(baseline, data, eval_data, images, options, notes)
    if train is not None and options.epochs != 0:
        plan_loss(baseline, train, options.loss_options)  # refuses a loss that the labels don't fit, before any work
    open_workspace(folder, configuration(source, train, evaluation, options), resume)
    if not (folder / "baseline.onnx").exists():
        save_model(baseline, folder / "baseline.onnx")
    calibration = train
    if train is None and (made := _made_up(baseline, units, folder / "inputs.npz", options, listener, notes)):
        calibration, evaluation = made.split(HELD_BACK, options.seed)
    for note in notes:
        listener.note(note)
    metric = find_metric(options.metric, evaluation)
    judge = Judge(baseline, evaluation, metric, options.threads, bool(data or eval_data))
    apart = eval_data is not None
    return Run(
        source, target, folder, baseline, moved, units, train, calibration, judge, apart, options, listener, notes
    ).execute()


def _load(
    model: ir.Model,
    data: Data | None,
    eval_data: Data | None,
    images: ImageOptions | None,
    options: RunOptions,
    notes: list[str],
) -> tuple[Dataset | None, Dataset]:
    """Training data, if any, and evaluation data: what is given, a part held back, or random inputs."""
    train, evaluation = (
        None if given is None else as_dataset(given, model, images, options.ignore_index).shuffled(options.seed)
        for given in (data, eval_data)
    )
    if evaluation is not None:
        return train, evaluation
    if train is None:
        if options.max_drop is not None or options.metric is not None:
            raise UsageError("--max-drop and --metric need data to measure on: give --data")
        if options.sparsify or options.minutes is not None:
            raise UsageError("--sparsify and --minutes are for fine-tuning, which needs data: give --data")
        if options.criterion == AUTO:
            raise UsageError("--criterion auto tries criteria on data: give --data, or name one")
        notes.append("no data: scored by weights alone; accuracy was not measured")
        return None, random_dataset(model, 64, options.seed)
    most = MOST_MEASURED if options.targets and options.max_drop is None else MOST_HELD
    train, evaluation = train.split(min(HELD_BACK, most / max(len(train), 1)), options.seed)
    notes.append(
        f"no --eval-data: {len(evaluation)} samples of --data are held back from training for decisions; if the model "
        "was trained on them, it remembers them, and drops look larger than they are on new data"
    )
    return train, evaluation


def _made_up(
    baseline: ir.Model, units: Units, path: Path, options: RunOptions, listener: Listener, notes: list[str]
) -> Dataset | None:
    """Inputs made from the model's own statistics, if it has any and training is available; they're kept in `path`."""
    if not path.exists():
        threads, macs = options.threads or os.cpu_count() or 1, costs_of(units)["macs"]
        show, found = partial(listener.progress, "making inputs from batch-normalisation statistics"), None
        try:
            found = synthetic_dataset(baseline, macs, options.seed, threads, show)
        except TrainingError as error:
            notes.append(f"without data nothing was repaired: no inputs could be made: {error}")
        write_arrays(path, found.inputs if found is not None else {})
    with np.load(path) as arrays:
        if not arrays.files:
            notes.append("fidelity is on random inputs")
            return None
        notes.append("layers were fitted, and fidelity measured, on inputs made from batch-normalisation statistics")
        return Dataset(dict(arrays), None)


@dataclass(frozen=True)
class State:
    """What is accepted so far: a model, the plan that leads to it from the baseline, and whether it was fine-tuned."""

    model: ir.Model
    plan: Plan
    tuned: bool = False


@dataclass(frozen=True)
class Run:
    """One run in its folder, everything checked and loaded."""

    source: Path
    output: Path
    folder: Path
    baseline: ir.Model
    moved: tuple[Reordering, ...]  # in the baseline, before anything was cut
    units: Units
    train: Dataset | None
    calibration: Dataset | None  # for repair: the training data, or made up
    judge: Judge
    apart: bool  # whether the data that decides was given as such
    options: RunOptions
    listener: Listener
    notes: list[str]

    # ---- what is asked

    @cached_property
    def targets(self) -> dict[str, float]:
        """The shares that may remain, by resource; empty when the allowed drop alone decides."""
        return self.options.targets or ({} if self.judge.measured else {"macs": WITHOUT_DATA})

    @cached_property
    def allowed(self) -> float | None:
        """Points that may be lost: one when there is data and nothing else was asked; None when any may."""
        return 1.0 if self.options.max_drop is None and not self.targets else self.options.max_drop

    @cached_property
    def epochs(self) -> int:
        """Epochs of fine-tuning in each round."""
        if self.train is None:
            return 0
        if self.options.epochs is not None:
            return self.options.epochs
        if self.options.minutes is not None:
            return ENDLESS
        return int(np.clip(round(STEPS_A_ROUND * self.options.batch / len(self.train)), 2, 60))

    @cached_property
    def seconds(self) -> float | None:
        """Seconds of fine-tuning in each round, where the user gave a time for all of them."""
        rounds = self.options.rounds or (1 if self.targets else ROUNDS)
        return None if self.options.minutes is None else 60 * self.options.minutes / rounds

    @cached_property
    def augmentation(self) -> dict[str, Any]:
        """The image augmentations that the uncut model itself is indifferent to."""
        if self.train is None or not (self.epochs or self.options.sparsify):
            return {}
        return choose_augmentation(self.baseline, self.train, self.options.threads)

    @cached_property
    def origin(self) -> Origin:
        """What the groups of the uncut model are like: scores of later rounds are relative to it."""
        origin = origin_of(self.units, self.target)
        if self.options.prior is None:
            return origin
        factors = load_sensitivity(Path(self.options.prior)).factors(self.units, self.options.seed)
        return {name: (size, factor * factors.get(name, 1.0)) for name, (size, factor) in origin.items()}

    @cached_property
    def base_costs(self) -> dict[str, int]:
        """MACs, parameters and bytes of the uncut model."""
        return costs_of(self.units, target=self.target)

    @cached_property
    def target(self) -> Probe | None:
        """The probed target, where its time matters; the first execution provider is the one that does."""
        if self.options.target_latency is None:
            return None
        return probe(find_providers(self.options.providers)[0], self.options.threads)

    @cached_property
    def rounding(self) -> Rounding:
        """How widths are rounded: as asked, or to the block of the first execution provider."""
        provider = find_providers(self.options.providers)[0]
        if self.options.round_to is not None or provider == CPU:
            return Rounding(self.options.round_to)
        return Rounding(None, probe(provider, self.options.threads).steps["conv"])

    @cached_property
    def criterion(self) -> str:
        """How units are scored: as named, or the winner of the contest."""
        return self.options.criterion if self.options.criterion != AUTO else min(self.contest, key=self.contest.get)  # type: ignore[arg-type]

    @cached_property
    def contest(self) -> dict[str, float]:
        """For --criterion auto, the loss after the same cut by each criterion, repaired, before any fine-tuning."""
        if self.options.criterion != AUTO:
            return {}
        found: dict[str, float] = memoised(self.folder / "contest.json", self._hold_contest)
        return found

    # ---- the loop

    def execute(self) -> Report:
        """Runs all rounds, finalises, benchmarks and reports."""
        started = time.monotonic()
        state, records, failure = self._without_layers(), list[Record](), None
        if self.epochs or self.options.sparsify:
            prepare_trainer(self.options.trainer, self.listener.note)  # before any work: it may not be had here
        self.listener.stage("measuring the uncut model")
        try:
            while (proposal := self._propose(state, records)) is not None:
                try:
                    record, state = self._round(len(records) + 1, state, proposal)
                except TrainingError as error:
                    failure, record = error, failed_record(proposal, error)
                    self.note(f"round {len(records) + 1} ended: {error}")
                records.append(record)
        except KeyboardInterrupt:
            self._write(state)
            self.listener.note(f"interrupted: the best accepted model is in {self.output}; --resume goes on from here")
            raise
        if failure is not None and not any(record["accepted"] for record in records):
            raise failure
        return self._report(state, records, started)

    def _without_layers(self) -> State:
        """What the first round starts from: the baseline, without the layers that matter least."""
        wanted = self.options.layers
        if wanted is None:
            return self._dropping([])
        layers = free_layers(self.baseline, self.options.protect)
        if self.train is None:
            chosen = choose_layers(layers, weight_scores(self.baseline, layers), None if wanted == "auto" else wanted)
        else:
            scores = influence_scores(self.baseline, layers, self.train, self.options.threads)
            if wanted == "auto":
                wanted = self._how_many(layers, scores)
            chosen = choose_layers(layers, scores, wanted)
        self.note(f"layers dropped: {', '.join(layer.name for layer in chosen) or 'none'}")
        return self._dropping(chosen)

    def _dropping(self, layers: list[Layer]) -> State:
        start = Plan({}, reordered=self.moved)
        if not layers:
            return State(self.baseline, start)
        model, dropped = drop_layers(self.baseline, [layer.name for layer in layers])
        return State(model, start.then(dropped))

    # ---- trials: the same cut in several ways, repaired and measured, before the first round

    def _how_many(self, layers: list[Layer], scores: list[float]) -> int:
        """How many layers to drop so that with widths cut to the same target the loss is lowest: 0, 1, 2, 4, 8 …"""

        def search() -> dict[str, float]:
            counts = [0] + [2**power for power in range(len(layers).bit_length()) if 2**power <= len(layers)]
            losses = dict[str, float]()
            for number, count in enumerate(counts):
                self.listener.progress(f"trying without {count} layers", number + 1, len(counts))
                losses[str(count)] = self._trial(self._dropping(choose_layers(layers, scores, count)), LINED_UP_BY)
            return losses

        losses: dict[str, float] = memoised(self.folder / "layers.json", search)
        self.note(f"layers to drop, by loss: {ranked(losses)}")
        return int(min(losses, key=losses.__getitem__))

    def _hold_contest(self) -> dict[str, float]:
        losses = dict[str, float]()
        for number, criterion in enumerate(CONTESTANTS):
            self.listener.progress(f"trying criteria: {criterion}", number + 1, len(CONTESTANTS))
            losses[criterion] = self._trial(self._dropping([]), criterion)
        losses = {name: loss for name, loss in losses.items() if loss < UNKNOWN} or {LINED_UP_BY: UNKNOWN}
        self.note(f"criteria by loss: {ranked(losses)}")
        return losses

    def _trial(self, state: State, criterion: str) -> float:
        """The loss after a cut to the targets, or to half of the MACs, and repair; `UNKNOWN` if it can't be made."""
        try:
            units, scores, rounding = self._scored(state.model, criterion)
        except ModelError:
            return UNKNOWN  # it needs what the model hasn't
        measures = Cost(units, self.target).measures
        limits = {name: share * self.base_costs[name] for name, share in (self.targets or TRIED_AT).items()}
        chosen = tau_for(units, scores, rounding, lambda a: all(measures[n](a) <= limit for n, limit in limits.items()))
        if chosen is None:
            return UNKNOWN
        model, step = cut(units, chosen[1])
        self._repair(model, state, step)
        return self.judge.measure(model, PROBE_SAMPLES).loss

    def note(self, text: str) -> None:
        """Something the user should know; it stands in the report too."""
        self.notes.append(text)
        self.listener.note(text)

    def _round_folder(self, number: int) -> Path:
        folder = self.folder / f"round-{number:02d}"
        folder.mkdir(exist_ok=True)
        return folder

    # ---- proposing a cut

    def _propose(self, state: State, records: list[Record]) -> Proposal | None:
        """The cut that the next round tries, from what the last ones cost; None when the run is done."""
        history = [outcome_of(record) for record in records]
        if self.targets:
            aim = next_progress(self.options.rounds or 1, history, self.options.schedule)
            if aim is None:
                return None
            compute = lambda: self._cut_to(state, aim)  # noqa: E731
        else:
            failures = sum(not outcome.accepted for outcome in history)
            if len(history) >= (self.options.rounds or ROUNDS) or failures > PATIENCE:
                return None
            compute = lambda: self._cut_within(state, history)  # noqa: E731
        found: Proposal = memoised(self._round_folder(len(records) + 1) / "proposal.json", compute)
        return found if found["tau"] is not None else None

    def _cut_to(self, state: State, aim: float) -> Proposal:
        """The lowest threshold that brings every targeted resource `aim` of the way to its share."""
        self.listener.stage("choosing a threshold")
        units, scores, rounding = self._scored(state.model)
        shares = {name: target**aim for name, target in self.targets.items()}
        measures = Cost(units, self.target).measures

        def cut_to(wanted: Mapping[str, float]) -> Proposal | None:
            limits = {name: share * self.base_costs[name] for name, share in wanted.items()}
            for attempt in (rounding, Rounding(1)):  # where whole blocks can't meet the target, ragged widths may
                chosen = tau_for(units, scores, attempt, lambda a: all(measures[n](a) <= limits[n] for n in limits))
                if chosen is not None:
                    return {"tau": chosen[0], "round_to": attempt.multiple, "progress": aim}
            return None

        found = cut_to(shares) if "latency" not in shares else self._cut_to_time(units, scores, shares, cut_to)
        if found is not None:
            return found
        self.note("the target is out of reach: cut as far as every layer keeps one channel")
        highest = float(np.nextafter(scores[np.isfinite(scores)].max(), np.inf))
        return {"tau": highest, "round_to": 1, "progress": 1.0}

    def _cut_to_time(
        self,
        units: Units,
        scores: NDArray[np.float64],
        shares: Mapping[str, float],
        cut_to: Callable[[Mapping[str, float]], Proposal | None],
    ) -> Proposal | None:
        """The cut whose measured time is nearest below its share of the uncut model's."""
        provider, proposals = find_providers(self.options.providers)[0], dict[float, Proposal]()

        def cut_at(estimate: float) -> tuple[float, float] | None:
            proposal = cut_to({**shares, "latency": estimate})
            if proposal is None:
                return None
            alive = survivors(units, scores, proposal["tau"], self._rounding_of(proposal))
            share = time_share(self.source, cut(units, alive)[0], provider, self.options.threads)
            self.listener.progress(f"measuring a cut: {100 * share:.1f} % of the time", len(proposals) + 1, CORRECTIONS)
            proposals[proposal["tau"]] = proposal
            return proposal["tau"], share

        chosen = correct(shares["latency"], cut_at)
        return None if chosen is None else {**proposals[chosen[0]], "latency": chosen[1]}

    def _rounding_of(self, proposal: Proposal) -> Rounding:
        return Rounding(proposal["round_to"], self.rounding.block)

    def _cut_within(self, state: State, history: list[Outcome]) -> Proposal:
        """A threshold whose cut costs no more, after repair, than fine-tuning can be hoped to win back."""
        units, scores, rounding = self._scored(state.model)
        allowed = self.allowed or 0.0
        if self.options.controller == "published":
            last = history[-1] if history else None
            moved = initial_tau(scores, self.options.initial_tau) if last is None else self._moved(last)
            return {"tau": moved * 0.5 ** sum(not o.accepted for o in history), "round_to": rounding.multiple}
        tried = 0

        def drop_at(tau: float) -> float:
            nonlocal tried
            tried += 1
            self.listener.progress("choosing a threshold", tried, EVALUATIONS)
            model, step = cut(units, survivors(units, scores, tau, rounding))
            self._repair(model, state, step)
            return self.judge.measure(model, PROBE_SAMPLES).most

        ending = len(history) + 1 >= (self.options.rounds or ROUNDS) or len(history) >= PATIENCE
        safe = ending and not any(outcome.accepted for outcome in history)
        tau = bisect_tau(scores, drop_at, reach(history, allowed, self.epochs > 0 and not safe))
        if tau is not None:
            macs = Cost(units).macs
            before, after = macs(np.ones(units.count, bool)), macs(survivors(units, scores, tau, rounding))
            tau = tau if after <= before * (1 - LEAST_GAIN) else None
        return {"tau": tau, "round_to": rounding.multiple}

    def _raw_scores(self, units: Units, criterion: str) -> NDArray[np.float64]:
        if criterion not in DATA_CRITERIA:
            return score_units(units, criterion, self.options.seed)
        if self.train is None:
            raise UsageError(f"--criterion {criterion} needs data: give --data")
        return DATA_CRITERIA[criterion](units, self.train)

    def _moved(self, last: Outcome) -> float:
        return published_tau(last.tau, last.loss, self.allowed or 0.0, self.options.alpha)

    def _scored(self, model: ir.Model, criterion: str | None = None) -> tuple[Units, NDArray[np.float64], Rounding]:
        options = self.options
        units = chosen_units(model, options.granularity, options.kinds, options.protect)
        raw = self._raw_scores(units, criterion or self.criterion)
        scores = normalise_scores(units, raw, options.scope, self.origin)
        sizes = {name: size for name, (size, _) in self.origin.items()}
        return units, bounded(units, scores, options.keep, sizes), self.rounding

    # ---- one round

    def _round(self, number: int, state: State, proposal: Proposal) -> tuple[Record, State]:
        """Cuts, repairs, fine-tunes and evaluates; the record, and what is accepted after it."""
        folder = self._round_folder(number)
        done = folder / "round.json"
        if not done.exists():
            record, candidate = self._attempt(number, folder, state, proposal)
            save_model(candidate.model, folder / "candidate.onnx")
            write_json(folder / "plan.json", candidate.plan.to_json(sha256(self.folder / "baseline.onnx")))
            write_json(done, record)  # last: its presence says that the round is complete
        for each in ("tune", "sparsify"):
            shutil.rmtree(folder / each, ignore_errors=True)
        record = json.loads(done.read_text())
        self.listener.note(
            f"round {number}: {100 * record['macs_share']:.0f} % of the MACs left, {self.judge.metric.name} "
            f"{record['metric']:.2f} ({-record['drop']:+.2f} ± {record['drop_error']:.2f}): "
            f"{'kept' if record['accepted'] else 'rolled back'}"
        )
        if not record["accepted"]:
            return record, state
        tuned = state.tuned or record["tuned"]
        return record, State(open_model(folder / "candidate.onnx"), load_plan(folder / "plan.json"), tuned)

    def _attempt(self, number: int, folder: Path, state: State, proposal: Proposal) -> tuple[Record, State]:
        started = time.monotonic()
        units, scores, _ = self._scored(state.model)
        alive = survivors(units, scores, proposal["tau"], self._rounding_of(proposal))
        costs = costs_of(units, alive, self.target)
        self.listener.stage(f"round {number}: cutting")
        if self.options.sparsify:
            state = self._sparsified(number, folder, state, units, alive)
            units = find_units(analyse(state.model, granularity_for(self.options.granularity, self.options.kinds)))
        model, step = cut(units, alive)
        check_cut(state.model, model, step)
        self._repair(model, state, step, partial(self.listener.progress, f"round {number}: repairing"), self.note)
        repaired = verdict = self.judge.measure(model)
        if self.epochs:
            tuned = model.clone()
            self._tune(number, folder / "tune", tuned, self.epochs, self.seconds)
            after = self.judge.measure(tuned)
            if self._better(after, repaired):
                model, verdict = tuned, after
            else:
                self.note(f"round {number}: fine-tuning lost {after.drop - repaired.drop:.2f} points and was undone")
        record = {
            "round": number,
            "tau": proposal["tau"],
            "progress": self._progress(costs, proposal),
            "macs_share": costs["macs"] / max(self.base_costs["macs"], 1),
            **costs,
            "metric_before_tuning": repaired.value,
            "drop_before_tuning": repaired.drop,
            "metric": verdict.value,
            "drop": verdict.drop,
            "loss": verdict.loss,
            "epochs": self.epochs,
            "tuned": bool(self.epochs) and verdict is not repaired,
            "drop_error": verdict.error,
            "accepted": self.allowed is None or verdict.most <= self.allowed,
            "widths": {group.name: int(alive[group.units].sum()) * group.repeats for group in units.groups},
            "seconds": time.monotonic() - started,
        }
        return record, State(model, state.plan.then(step))

    def _better(self, tuned: Verdict, repaired: Verdict) -> bool:
        """Whether fine-tuning is kept.

        What was held back from `--data` may have been learned by heart by the uncut model, and what is left of that in
        the repaired one counts for it there and nowhere else: then fine-tuning is undone only if it costs the round.
        """
        if self.apart:
            return (tuned.drop, tuned.loss) <= (repaired.drop, repaired.loss)
        return self.allowed is None or tuned.most <= self.allowed or repaired.most > self.allowed

    def _sparsified(self, number: int, folder: Path, state: State, units: Units, alive: Alive) -> State:
        """The same model, fine-tuned while what is about to be cut fades."""
        model = state.model.clone()
        self._tune(number, folder / "sparsify", model, self.options.sparsify, None, fading_parts(units, alive))
        return State(model, state.plan, tuned=True)

    def _tune(
        self,
        number: int,
        folder: Path,
        model: ir.Model,
        epochs: int,
        seconds: float | None,
        fading: dict[str, NDArray[np.bool_]] | None = None,
    ) -> None:
        assert self.train is not None
        what = f"round {number}: {'making sparse' if fading else 'fine-tuning'}"
        options = TrainingOptions(
            trainer=self.options.trainer,
            epochs=epochs,
            seconds=seconds,
            lr=self.options.lr or default_rate(model),
            batch=self.options.batch,
            loss=self.options.loss_options,
            ema=self.options.ema,
            stop_after=self.options.stop_after,
            freeze=self.options.freeze,
            threads=self.options.threads or os.cpu_count() or 1,
            seed=self.options.seed + number,
        )

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "note":
                self.listener.note(event["message"])
                return
            accuracy = f", accuracy {100 * event['accuracy']:.0f} %" if event["accuracy"] is not None else ""
            where = f"{what}, epoch {event['epoch']}" + ("" if seconds else f"/{epochs}")
            done, whole = (event["step"], event["total"]) if not seconds else (round(1000 * event["progress"]), 1000)
            self.listener.progress(f"{where}, loss {event['loss']:.3f}{accuracy}", done, whole)

        self.listener.stage(f"{what}, preparing")
        fine_tune(model, self.baseline, self.train, folder, options, self.augmentation, show, fading)

    def _repair(
        self,
        model: ir.Model,
        state: State,
        step: Plan,
        progress: Callable[[int, int], None] = lambda *_: None,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        """What can be done without training: layers fitted to those before the cut, or else batch normalisation.

        In the first round those before the cut are the uncut model's, in later ones those that were fine-tuned since.
        """
        if self.calibration is None:
            return
        whole, plan = (state.model, step) if state.tuned else (self.baseline, state.plan.then(step))
        memory, before = self.options.memory and self.options.memory << 20, model.clone()
        if not reconstruct(model, whole, plan, self.calibration, self.options.threads, progress, memory, note):
            reestimate_batch_norm(model, self.calibration, self.options.threads)
        if undo_if_worse(model, before, whole, self.calibration, self.options.threads):
            note("repair took the outputs further from the uncut ones, and was undone")

    def _progress(self, costs: dict[str, int], proposal: Proposal) -> float:
        """How far costs are on the way to the targets: 1 when all are met, on a logarithmic scale.

        Time was measured when the cut was chosen; that it is as far as was aimed for is taken from there.
        """
        done = [
            proposal["progress"]
            if name == "latency"
            else np.log(max(costs[name], 1) / self.base_costs[name]) / np.log(target)
            for name, target in self.targets.items()
        ]
        return float(np.clip(min(done, default=0.0), 0, 1))

    # ---- the end

    def _write(self, state: State) -> None:
        """Writes the accepted model and its plan, to the run folder and to the output."""
        save_model(finalise(state.model), self.folder / "pruned.onnx")
        write_json(self.folder / "plan.json", state.plan.to_json(sha256(self.folder / "baseline.onnx")))
        save_model(open_model(self.folder / "pruned.onnx"), self.output)

    def _quantise(self, numbers: Numbers) -> None:
        """Makes the numbers of the result smaller, unless that costs more points than may be lost."""
        place = self.folder / "quantised.onnx"
        quantise(self.folder / "pruned.onnx", place, numbers, self.train)
        verdict = self.judge.measure(open_model(place))
        if self.allowed is not None and verdict.drop > self.allowed:
            self.note(f"with {numbers} numbers {verdict.drop:.2f} points are lost: left as they were; see {place}")
            return
        save_model(open_model(place), self.output)

    def _report(self, state: State, records: list[Record], started: float) -> Report:
        self.listener.stage("saving and checking the result")
        self._write(state)
        if self.options.quantize is not None:
            self._quantise(self.options.quantize)
        self.listener.stage("benchmarking before against after")
        paths = (self.source, self.output)
        results = bench_models(paths, self.options.providers, self.options.threads, seconds=self.options.bench_seconds)
        latencies, memory, speedup = latency_sides(results)
        all_costs = (self.base_costs, costs_of(find_units(analyse(state.model))))
        verdicts = [self.judge.measure(open_model(path)) for path in paths]
        sides = [
            Side(
                str(path),
                costs["macs"],
                costs["params"],
                model_bytes(path),
                {"name": self.judge.metric.name, "value": verdict.value} if self.judge.measured else None,
                {"cosine": verdict.cosine},
                latencies[index],
                memory[index],
            )
            for index, (path, costs, verdict) in enumerate(zip(paths, all_costs, verdicts, strict=True))
        ]
        report = Report(
            baseline=sides[0],
            pruned=sides[1],
            rounds=tuple(records),
            widths=widths(self.baseline, state.model),
            target=self._verdict(
                all_costs[1], 1 / results[1].against_first.speedup, verdicts[1].drop - verdicts[0].drop
            ),
            speedup=speedup,
            notes=tuple(self.notes),
            contest=self.contest,
            run_dir=str(self.folder),
            options=asdict(self.options),
            versions=versions(),
            model_sha256=sha256(self.source),
            seconds=time.monotonic() - started,
        )
        write_json(self.folder / "report.json", report.to_json())
        return report

    def _verdict(self, costs: dict[str, int], time: float, drop: float) -> dict[str, Any]:
        """What was asked, what was reached, and whether that is enough; time, which varies, may be 5 % over."""
        reached = {name: cost / max(self.base_costs[name], 1) for name, cost in costs.items()} | {"latency": time}
        asked = {name: {"asked": share, "reached": reached[name]} for name, share in self.targets.items()}
        met = all(
            entry["reached"] <= entry["asked"] * (OVER if name == "latency" else 1) for name, entry in asked.items()
        )
        if self.allowed is not None:
            met = met and drop <= self.allowed + 1e-9 and (bool(asked) or costs["macs"] < self.base_costs["macs"])
        return {
            "resources": asked,
            "max_drop": self.allowed,
            "drop": drop if self.judge.measured else None,
            "met": bool(met),
        }


def default_rate(model: ir.Model) -> float:
    """A peak learning rate: networks with batch normalisation bear, and use, a higher one."""
    normalised = any(node.op_type == "BatchNormalization" for node in model.graph)
    return RATE_WITH_BATCH_NORM if normalised else RATE


def costs_of(units: Units, alive: Alive | None = None, target: Probe | None = None) -> dict[str, int]:
    """MACs, parameters and bytes of what survives, of all without `alive`; and the estimated time on a target."""
    alive = np.ones(units.count, bool) if alive is None else alive
    measures = Cost(units, target).measures
    return {name: measures[name](alive) for name in RESOURCES if name != "latency" or target is not None}


def outcome_of(record: Record) -> Outcome:
    """What the controllers learn from a round; what couldn't be measured counts as infinitely bad."""
    worst = {name: float("inf") if record.get(name) is None else record[name] for name in MEASURED}
    drop, loss, before = worst.values()
    return Outcome(record["tau"], drop, loss, record["accepted"], record["progress"], before)


def ranked(losses: Mapping[str, float]) -> str:
    """Losses in words, the lowest first."""
    return ", ".join(f"{name} {losses[name]:.4f}" for name in sorted(losses, key=losses.__getitem__))


def failed_record(proposal: Proposal, error: TrainingError) -> Record:
    """The record of a round whose training failed: nothing of it is kept."""
    nothing = {"drop": None, "loss": None, "metric": None, "macs_share": None, "accepted": False}
    return {"tau": proposal["tau"], "progress": proposal.get("progress", 0.0), **nothing, "error": str(error)}
