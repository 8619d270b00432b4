"""The round loop: load, normalise, analyse, score, threshold, cut, repair, fine-tune, evaluate, accept or roll back.

Every step that takes long leaves its result in the run folder, and every decision is a pure function of those results.
Resuming is running again: what is there isn't computed twice.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import filter as filter_names
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.benchmarking.bench import Comparison, bench_models, find_providers, model_bytes
from onnxprune.benchmarking.latency import time_share
from onnxprune.choosing.layers import drop_layers
from onnxprune.choosing.sensitivity import load_sensitivity
from onnxprune.choosing.threshold import Move, drawn, said
from onnxprune.cutting.cut import cut
from onnxprune.cutting.plan import Plan, load_plan
from onnxprune.cutting.verify import check_cut
from onnxprune.errors import DataError, TrainingError, UsageError
from onnxprune.evaluating.data import Dataset, random_dataset
from onnxprune.evaluating.judge import Judge, Verdict
from onnxprune.evaluating.metrics import find_metric, output_weights
from onnxprune.evaluating.preparations import TRIED, Tried, clearly_better, tried_on_folder
from onnxprune.evaluating.sources import ImageFolder, ImageOptions, as_dataset
from onnxprune.exporting.finalise import PADS_APART, finalise, pads_before_convolutions
from onnxprune.exporting.quantise import Numbers, quantise
from onnxprune.graph.files import memoised, sha256, write_json
from onnxprune.graph.model import check_outputs, files_of, open_model, save_model
from onnxprune.graph.threads import number_of_threads
from onnxprune.labels import analyse
from onnxprune.labels.units import (
    Units,
    chosen_units,
    fading_parts,
    find_units,
    granularity_for,
    prunable,
    weight_matrix,
)
from onnxprune.normalising.normalise import normalise
from onnxprune.progress import Listener
from onnxprune.repairing.reconstruct import Repaired
from onnxprune.running.context import Context, Proposal, Record, State, costs_of
from onnxprune.running.options import RunOptions
from onnxprune.running.proposals import CHECK_SECONDS, SLOWER, alive_of, propose
from onnxprune.running.report import Quality, Report, Side, decimals, latency_sides, versions, widths
from onnxprune.running.trials import LINED_UP_BY, contest, uncut
from onnxprune.running.workspace import Command, configuration, load_command, opened_workspace
from onnxprune.scoring.cost import Alive
from onnxprune.scoring.lineup import line_up
from onnxprune.scoring.score import CRITERIA, weight_values
from onnxprune.training import TrainingOptions, choose_trainer, fine_tune, prepare_trainer
from onnxprune.training.losses import plan_loss
from onnxprune.training.synthesise import noise_dataset, synthetic_dataset
from onnxprune.training.worker import write_arrays

HELD_BACK = 0.2  # share of the samples for decisions, when no evaluation data is given, but at most
FEW_HELD = 16  # samples from which something can be told
MOST_HELD, MOST_MEASURED = 5000, 1000  # where the drop decides, and where it is only measured

TOLD = ("tau", "before", "moves", "scores", "layers", "removed", "removed_layers")  # a round's record of its threshold

OVER = 1.05  # times the time asked that still counts as met

Data = str | Sequence[str] | Mapping[str, NDArray[Any]]


def run(
    model: str | os.PathLike[str] | None,
    data: Data | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    eval_data: Data | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    images: ImageOptions | None = None,
    options: RunOptions | None = None,
    listener: Listener | None = None,
) -> Report:
    """Prunes, repairs, fine-tunes, checks and benchmarks a model, and writes the result to `output`.

    `data` and `eval_data` are paths, `module:function`, or dicts of arrays (see `load_data`). The best accepted model
    is written even when the targets aren't met: `Report.met` tells. One that is of no use isn't, unless `force` is set:
    `Report.quality` tells. A folder that holds a run already is gone on with by `resume`, or emptied by `overwrite`;
    to go on `run(None, run_dir=FOLDER, resume=True)` is enough. Raises a subclass of `OnnxPruneError` for a model,
    data or options that can't be used; `KeyboardInterrupt` leaves the best accepted model at `output`.
    """
    listener = listener or Listener()
    if model is None:
        return _resumed(run_dir, resume, listener)
    options = options or RunOptions()
    source = Path(model)
    target = Path(output) if output is not None else source.with_suffix(".pruned.onnx")
    given = [each for place in (data, eval_data) if not isinstance(place, Mapping) for each in _paths(place)]
    given += _paths(options.prior)
    check_outputs(source, [target], given)
    find_providers(options.providers)
    if options.prior is not None:
        load_sensitivity(Path(options.prior))  # refuses anything else before any work
    folder = Path(run_dir) if run_dir is not None else target.with_suffix(".onnxprune")
    for path in (*files_of(source), *given):
        if folder.resolve() in path.parents:
            raise UsageError(f"{path} lies in the run folder {folder}, which is emptied: choose another --run-dir")
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
    for pattern in options.freeze:
        if not filter_names(baseline.graph.initializers, pattern):
            raise UsageError(f"--freeze {pattern}: no parameter has such a name")
    outputs = [value.name or "" for value in baseline.graph.outputs]
    weights = output_weights(dict(options.weigh), outputs)
    metric = find_metric(options.metric, evaluation, weights)
    judge = Judge(
        baseline,
        evaluation,
        metric,
        options.threads,
        bool(data or eval_data),
        eval_data is not None,
        None if weights is None else tuple(weights),
    )
    if judge.measured:
        listener.stage("measuring the uncut model")
        judge = _looked_at(judge, notes, _folders(eval_data or data), images or ImageOptions())
    config = configuration(source, train, evaluation, options, Command.of(source, data, eval_data, target, images))
    with opened_workspace(folder, config, resume, overwrite):
        if not (folder / "baseline.onnx").exists():
            save_model(baseline, folder / "baseline.onnx")
        calibration = train
        if train is None and (made := _made_up(baseline, units, folder / "inputs.npz", options, listener, notes)):
            calibration, held = made.split(HELD_BACK, options.seed)
            judge = judge if eval_data is not None else replace(judge, evaluation=held)
        if options.controller != "bisect" and not judge.measured:
            raise UsageError(f"--controller {options.controller}: what is lost is measured: give --data")
        if options.layers and calibration is None:
            raise UsageError("--layers: what they lose is measured: give --data; 'prune --layers' goes by weights")
        for note in notes:
            listener.note(note)
        return Run(
            source, target, folder, baseline, moved, units, train, calibration, judge, options, listener, notes
        ).execute()


def _resumed(run_dir: str | os.PathLike[str] | None, resume: bool, listener: Listener) -> Report:
    """Goes on with the run of a folder, by what it was started with."""
    if not resume or run_dir is None:
        raise UsageError("give a MODEL, or --resume and --run-dir FOLDER to go on with the run of that folder")
    command, options = load_command(Path(run_dir))
    if command.folder not in sys.path:
        sys.path.insert(0, command.folder)  # where module:function was found
    return run(
        command.model, command.data, output=command.output, eval_data=command.eval_data, run_dir=run_dir, resume=True,
        images=command.images, options=options, listener=listener,
    )  # fmt: skip


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A second Ctrl-C waits until what the first one asked for is written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _looked_at(judge: Judge, notes: list[str], folders: list[Path], images: ImageOptions) -> Judge:
    """The judge, once the uncut model was measured beside guessing, and its metric's direction and scale are known.

    Folders of images are tried in the usual other preparations. Raises `DataError` where the uncut model can't be told
    from guessing, so that no cut could be judged.
    """
    tried = tried_on_folder(folders[0], judge.baseline, images, judge.threads) if folders else []
    better = clearly_better(tried)
    if judge.metric.name == "fidelity" and len(judge.unexercised) == len(judge.baseline.graph.outputs):
        raise DataError(
            f"the outputs {', '.join(judge.unexercised)} hardly differ between the {len(judge.evaluation)} samples "
            "that are measured on, so no cut could be judged: give samples that exercise them, and more of them"
        )
    if judge.unexercised:
        notes.append(f"the samples don't exercise these outputs, which don't count: {', '.join(judge.unexercised)}")
    told = judge.told()
    metric = told.metric
    if told.unclear is not None:
        raise DataError(
            f"the uncut model is no better than guessing on this data ({told.unclear}): nothing was cut. "
            + _advice(tried, better)
        )
    if better is not None:
        notes.append(
            f"WARNING: the uncut model is right in {100 * tried[0].right:.0f} % of {TRIED} images at most as they are "
            f"prepared, and in {better}: check --mean, --std and the like"
        )
    if metric.own:
        guessed = "an unknown value" if told.guess is None else f"{told.guess:.4g}"
        said = f"metric {metric.name}: {told.uncut:.4g} for the uncut model, {guessed} for guessing; "
        said += f"{'higher' if metric.higher_is_better else 'lower'} is better"
        said += " (taken from that)" if judge.metric.higher_is_better is None else ""
        if metric.scale is not None:
            said += f"; a point is {metric.scale / 100:.4g}" + (
                " (taken from that)" if judge.metric.scale is None else ""
            )
        notes.append(said)
    return told


def _advice(tried: list[Tried], better: Tried | None) -> str:
    """What may be wrong with the data of a model that seems to guess."""
    if better is not None:
        return f"It is right in {better}: give these options. Tried: {'; '.join(map(str, tried))}"
    if tried:
        return f"Preparations tried, none of them right: {'; '.join(map(str, tried))}"
    return (
        "Are the inputs prepared as in training (range, mean, order of channels), the labels in the model's order, and "
        "the metric the right one (--metric)?"
    )


def _folders(given: Data | None) -> list[Path]:
    """The data that are folders of images."""
    return [] if isinstance(given, Mapping) else [path for path in _paths(given) if path.is_dir()]


def _paths(places: str | os.PathLike[str] | Sequence[str] | None) -> list[Path]:
    """What may be paths, resolved."""
    single = [places] if isinstance(places, str | os.PathLike) else places or []
    return [Path(each).resolve() for each in single]


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
    for path in {*_folders(data), *_folders(eval_data)}:
        folder = ImageFolder.of(path, model, images or ImageOptions())
        notes.append(folder.said(images or ImageOptions()))
    if train is None:
        if evaluation is None and (options.max_drop is not None or options.metric is not None):
            raise UsageError("--max-drop and --metric need data to measure on: give --data")
        if options.epochs or options.sparsify or options.minutes is not None:
            raise UsageError("--epochs, --sparsify and --minutes are for fine-tuning, which needs data: give --data")
    if evaluation is not None:
        return train, evaluation
    if train is None:
        notes.append("no data: scored by weights alone; accuracy was not measured")
        return None, random_dataset(model, 64, options.seed)
    if len(train) < 2:
        raise DataError("one sample can't be learned from and measured on: give more, or --eval-data")
    most = MOST_MEASURED if options.targets and options.max_drop is None else MOST_HELD
    train, evaluation = train.split(held_share(len(train), most), options.seed)
    notes.append(
        f"no --eval-data: {len(evaluation)} samples of --data are held back from training for decisions; if the model "
        "was trained on them, it remembers them, and drops look larger than they are on new data"
    )
    return train, evaluation


def held_share(samples: int, most: int) -> float:
    """The share of samples held back for decisions: a fifth, of few samples up to a third, of many at most so many."""
    return min(max(HELD_BACK, min(FEW_HELD / samples, 1 / 3)), most / samples)


def _made_up(
    baseline: ir.Model, units: Units, path: Path, options: RunOptions, listener: Listener, notes: list[str]
) -> Dataset | None:
    """Inputs made from the model's own statistics, kept in `path`; noise where there are none.

    None for models that read anything but floats, of which noise says nothing.
    """
    macs = costs_of(units)["macs"]
    if not path.exists():
        threads, found = number_of_threads(options.threads), None
        show = partial(listener.progress, "making inputs from batch-normalisation statistics")
        try:
            found = synthetic_dataset(baseline, macs, options.seed, threads, show)
        except TrainingError as error:
            notes.append(f"no inputs could be made from batch-normalisation statistics: {error}")
        write_arrays(path, found.inputs if found is not None else {})
    with np.load(path) as arrays:
        if arrays.files:
            notes.append(
                "layers were fitted, and fidelity measured, on inputs made from batch-normalisation statistics"
            )
            return Dataset(dict(arrays), None)
    noise = noise_dataset(baseline, macs, options.seed)
    notes.append(
        "nothing was fitted, and fidelity is on random inputs"
        if noise is None
        else "layers fitted, and fidelity measured, on noise; a few samples of the data, without labels, do better"
    )
    return noise


@dataclass(frozen=True)
class Run(Context):
    """The rounds of a run."""

    # ---- the loop

    def execute(self) -> Report:
        """Runs all rounds, finalises, benchmarks and reports."""
        started = time.monotonic()
        self._look_at_pads()
        state, records, failure = uncut(self), list[Record](), None
        if self.epochs or self.options.sparsify:
            self._prepare_trainer()
        try:
            while (proposal := propose(self, state, records)) is not None:
                try:
                    record, state = self._round(len(records) + 1, state, proposal)
                except TrainingError as error:
                    failure, record = error, failed_record(proposal, error)
                    self.note(f"round {len(records) + 1} ended: {error}")
                records.append(record)
            if failure is not None and not any(record["accepted"] for record in records):
                raise failure
            return self._report(state, records, started)
        except KeyboardInterrupt:
            with uninterrupted():
                kept = self._kept_of(state if any(record["accepted"] for record in records) else None)
                raise KeyboardInterrupt(f"{kept}; --resume goes on from here") from None

    def _prepare_trainer(self) -> None:
        """Gets what trains before any work; where it can't be had, and none was asked for, the other one is used."""
        try:
            prepare_trainer(self.trainer, self.listener.note)
        except TrainingError as error:
            if self.options.trainer != "auto":
                raise
            self.note(f"{error}. Fine-tuning goes on without it, as by --trainer graph")
            self.__dict__["trainer"] = "graph"  # what the cached property gives from now on

    def _look_at_pads(self) -> None:
        """Whether pads are kept apart from convolutions in what is handed over: where that is faster here.

        Folding constants lets ONNX Runtime fuse them, which it couldn't in many a user's file, and isn't always a gain.
        """
        if not pads_before_convolutions(self.baseline):
            return
        provider = find_providers(self.options.providers)[0]

        def time_of(apart: bool) -> float:
            self.baseline.metadata_props[PADS_APART] = "1" if apart else ""
            return time_share(self.source, self.baseline, provider, self.options.threads, self.sizes, CHECK_SECONDS)

        found: dict[str, float] = memoised(
            self.folder / "pads.json", lambda: {"fused": time_of(False), "apart": time_of(True)}
        )
        self.baseline.metadata_props.pop(PADS_APART, None)  # nothing of it is handed over
        if found["apart"] * SLOWER < found["fused"]:
            self.baseline.metadata_props[PADS_APART] = "1"

    def _kept_of(self, state: State | None) -> str:
        """Writes what was accepted, where it is of use, and says so."""
        if state is None:
            return "no cut was accepted yet, so nothing was written"
        self._save(state)
        if not self._good_enough(state.useful):
            return f"what was accepted is of little use, and is in {self.folder} only"
        save_model(open_model(self.folder / "pruned.onnx"), self.output)
        return f"the best accepted model is in {self.output}"

    def _good_enough(self, useful: float) -> bool:
        return self.options.force or not self.judge.measured or useful >= self.options.floor

    # ---- one round

    def _round(self, number: int, state: State, proposal: Proposal) -> tuple[Record, State]:
        """Cuts, repairs, fine-tunes and evaluates; the record, and what is accepted after it."""
        folder = self.round_folder(number)
        done = folder / "round.json"
        if not done.exists():
            record, candidate = self._attempt(number, folder, state, proposal)
            save_model(candidate.model, folder / "candidate.onnx")
            write_json(folder / "plan.json", candidate.plan.to_json(sha256(self.folder / "baseline.onnx")))
            write_json(done, record)  # last: its presence says that the round is complete
        for each in (*folder.glob("tune-*"), folder / "sparsify"):
            shutil.rmtree(each, ignore_errors=True)
        record = json.loads(done.read_text())
        self.listener.note(f"round {number}: {said(record['before'], record['tau'], _moves_of(record))}")
        self.listener.detail(drawn(record["scores"]))
        self.listener.note(f"round {number}: {self._said(record)}")
        if not record["accepted"]:
            return record, state
        tuned = state.tuned or record["tuned"]
        plan = load_plan(folder / "plan.json")
        return record, State(open_model(folder / "candidate.onnx"), plan, tuned, record["useful"])

    def _said(self, record: Record) -> str:
        """A round in words: what is left, the metric, before and after fine-tuning, and what became of it."""
        better = 1 if self.judge.metric.higher_is_better else -1
        value, uncut = record["metric"], self.judge.uncut
        places = decimals(value, uncut, record["metric_before_tuning"])
        tuned = "" if not record["tuned"] else f", {record['metric_before_tuning']:.{places}f} before fine-tuning"
        kept = "kept" if record["accepted"] else "rolled back"
        return (
            f"{100 * record['macs_share']:.0f} % of the MACs left, {self.judge.metric.name} {value:.{places}f} "
            f"({-better * record['drop']:+.{places}f} ± {record['drop_error']:.{places}f}{tuned}): {kept}"
        )

    def _attempt(self, number: int, folder: Path, state: State, proposal: Proposal) -> tuple[Record, State]:
        started = time.monotonic()
        self.listener.stage(f"round {number}: cutting")
        thinner, dropped = drop_layers(state.model, proposal["layers"])
        units = chosen_units(thinner, self.options.granularity, self.options.kinds, self.options.protect)
        alive = alive_of(units, proposal)
        costs = costs_of(units, alive, self.target)
        if self.options.sparsify:
            state = self._sparsified(number, folder, State(thinner, state.plan.then(dropped)), units, alive)
            dropped = Plan({})
            units = find_units(analyse(state.model, granularity_for(self.options.granularity, self.options.kinds)))
        model, step = cut(units, alive)
        step = dropped.then(step)
        checked = check_cut(state.model, model, step)
        said = partial(self.listener.progress, f"round {number}: repairing")
        layers = self.repair(model, state, step, said, self.note)
        self._say_what_was_not_repaired(number, layers)
        repaired, epochs = self.judge.measure(model), 0
        verdict = repaired
        if self.epochs:
            tuned, after, epochs = self._tuned(number, folder, model, state.plan.then(step))
            if self._better(after, repaired):
                model, verdict = tuned, after
                if (after.drop, after.loss) > (repaired.drop, repaired.loss):
                    self.note(
                        f"round {number}: tuning is kept although {self.judge.metric.name} fell: what is held back "
                        "of --data may be known by heart, which tuning unlearns; --eval-data tells"
                    )
            else:
                places = decimals(after.value, repaired.value)
                self.note(
                    f"round {number}: fine-tuning was undone: {self.judge.metric.name} {after.value:.{places}f} after "
                    f"it, {repaired.value:.{places}f} before"
                )
        record = {
            "round": number,
            **{name: proposal[name] for name in TOLD},
            "progress": self._progress(costs, proposal),
            "out_of_reach": proposal.get("out_of_reach", False),
            "macs_share": costs["macs"] / max(self.base_costs["macs"], 1),
            **costs,
            "metric_before_tuning": repaired.value,
            "drop_before_tuning": repaired.drop,
            "metric": verdict.value,
            "drop": verdict.drop,
            "loss": verdict.loss,
            "epochs": epochs,
            "trainer": choose_trainer(self.trainer) if self.epochs else None,
            "tuned": bool(self.epochs) and verdict is not repaired,
            "drop_error": verdict.error,
            "drop_counted": verdict.most,
            "check": checked.outcome,
            "check_why": checked.why,
            "useful": verdict.useful,
            "fidelity": verdict.fidelity,
            "accepted": self.allowed is None or verdict.most <= self.allowed,
            "repair": [each.to_json() for each in layers],
            "norms": {
                value.name: float(np.linalg.norm(weight_matrix(value))) for value in dict.fromkeys(weight_values(model))
            },
            "widths": {group.name: int(alive[group.units].sum()) * group.repeats for group in units.groups},
            "seconds": time.monotonic() - started,
        }
        return record, State(model, state.plan.then(step))

    def _say_what_was_not_repaired(self, number: int, layers: list[Repaired]) -> None:
        left = Counter(each.why_not for each in layers if each.why_not)
        if left:
            reasons = "; ".join(f"{count}: {reason}" for reason, count in left.most_common(3))
            self.note(f"round {number}: {sum(left.values())} of {len(layers)} layers weren't repaired ({reasons})")

    def _better(self, tuned: Verdict, repaired: Verdict) -> bool:
        """Whether fine-tuning is kept.

        It is where the metric says so, on data that is fair: given apart, or without labels. Labels that were held back
        from `--data` the uncut model may know by heart, and what is left of that in the repaired one counts for it
        there and nowhere else: then fine-tuning is undone only if it costs the round.
        """
        if self.judge.apart or self.judge.evaluation.labels is None:
            return (tuned.drop, tuned.loss) <= (repaired.drop, repaired.loss)
        return self.allowed is None or tuned.most <= self.allowed or repaired.most > self.allowed

    def _tuned(self, number: int, folder: Path, model: ir.Model, plan: Plan) -> tuple[ir.Model, Verdict, int]:
        """A fine-tuned copy, the verdict on it, and its epochs.

        Where more than is allowed was lost, but by less than its error, it is worth as many epochs again, unless the
        user has said how many.
        """
        tuned, chosen = model.clone(), (self.options.epochs, self.options.minutes) != (None, None)
        for epochs in (self.epochs, 2 * self.epochs):
            self._tune(number, folder / f"tune-{epochs}", tuned, self.epochs, self.seconds, plan)
            verdict = self.judge.measure(tuned)
            almost = self.allowed is not None and verdict.drop - verdict.error <= self.allowed < verdict.most
            if chosen or not almost or epochs > self.epochs:
                break
            self.listener.note(f"round {number}: {verdict.drop:.2f} ± {verdict.error:.2f} lost: tuning as long again")
        return tuned, verdict, epochs

    def _sparsified(self, number: int, folder: Path, state: State, units: Units, alive: Alive) -> State:
        """The same model, fine-tuned while what is about to be cut fades."""
        model = state.model.clone()
        fading = fading_parts(units, alive)
        self._tune(number, folder / "sparsify", model, self.options.sparsify, None, state.plan, fading)
        return State(model, state.plan, tuned=True)

    def _tune(
        self,
        number: int,
        folder: Path,
        model: ir.Model,
        epochs: int,
        seconds: float | None,
        plan: Plan,
        fading: dict[str, NDArray[np.bool_]] | None = None,
    ) -> None:
        assert self.train is not None
        what = f"round {number}: {'making sparse' if fading else 'fine-tuning'}"
        options = TrainingOptions(
            trainer=self.trainer,
            epochs=epochs,
            seconds=seconds,
            lr=self.options.lr,
            batch=self.options.batch,
            loss=self.options.loss_options,
            ema=self.options.ema,
            stop_after=self.options.stop_after,
            freeze=self.options.freeze,
            batch_statistics=self.options.batch_statistics,
            threads=number_of_threads(self.options.threads),
            seed=self.options.seed + number,
        )

        def show(event: dict[str, Any]) -> None:
            if event["event"] == "note":
                self.listener.note(event["message"])
                return
            if event["event"] == "trial":
                return
            accuracy = f", accuracy {100 * event['accuracy']:.0f} %" if event["accuracy"] is not None else ""
            where = f"{what}, epoch {event['epoch']}" + ("" if seconds else f"/{epochs}")
            done, whole = (event["step"], event["total"]) if not seconds else (round(1000 * event["progress"]), 1000)
            self.listener.progress(f"{where}, loss {event['loss']:.3f}{accuracy}", done, whole)

        self.listener.stage(f"{what}, preparing")
        fine_tune(model, self.baseline, self.train, folder, options, self.augmentation, show, fading, plan)

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

    def _save(self, state: State) -> Path:
        """Writes the accepted model and its plan to the run folder."""
        save_model(finalise(state.model), self.folder / "pruned.onnx")
        write_json(self.folder / "plan.json", state.plan.to_json(sha256(self.folder / "baseline.onnx")))
        return self.folder / "pruned.onnx"

    def _quantised(self, whole: Path, numbers: Numbers) -> Path:
        """The result with smaller numbers, or as it was where that costs more than may be lost."""
        place = self.folder / "quantised.onnx"
        quantise(whole, place, numbers, self.train)
        verdict = self.judge.measure(open_model(place))
        over = self.allowed is not None and verdict.drop > self.allowed
        if not over and (
            self._good_enough(verdict.useful) or not self._good_enough(self.judge.measure(open_model(whole)).useful)
        ):
            return place
        lost = f"{self.judge.metric.name} falls by {verdict.drop:.{decimals(verdict.drop, self.allowed or 0.0)}f}"
        self.note(f"with {numbers} numbers {lost}: left as they were; see {place}")
        return whole

    def _report(self, state: State, records: list[Record], started: float) -> Report:
        self.listener.stage("saving and checking the result")
        found = self._save(state)
        if self.options.quantize is not None:
            found = self._quantised(found, self.options.quantize)
        verdicts = [self.judge.measure(open_model(path)) for path in (self.source, found)]
        written = self._good_enough(verdicts[1].useful)
        if written:
            save_model(open_model(found), self.output)
        self.listener.stage("benchmarking before against after")
        paths = (self.source, self.output if written else found)
        providers, threads, seconds = self.options.providers, self.options.threads, self.options.bench_seconds
        results = bench_models(paths, providers, threads, seconds=seconds, shapes=self.sizes)
        latencies, memory, speedup = latency_sides(results)
        costs = costs_of(find_units(analyse(state.model)))
        before, after = map(self._side, paths, (self.base_costs, costs), verdicts, latencies, memory)
        report = Report(
            baseline=before,
            pruned=after,
            rounds=tuple(records),
            widths=widths(self.baseline, state.model),
            target=self._verdict(costs, results[1].against_first, verdicts[1].drop - verdicts[0].drop),
            speedup=speedup,
            notes=tuple(self.notes),
            quality=self._quality(verdicts[1], written),
            unchecked=tuple(r["check_why"] for r in records if r["accepted"] and r["check"] != "equal"),
            contest=contest(self),
            run_dir=str(self.folder),
            options=asdict(self.options),
            versions=versions(),
            model_sha256=sha256(self.source),
            seconds=time.monotonic() - started,
        )
        write_json(self.folder / "report.json", report.to_json())
        return report

    def _quality(self, verdict: Verdict, written: bool) -> Quality:
        judge = self.judge
        if not judge.measured:
            return Quality(False)
        metric = judge.metric
        return Quality(
            True, metric.name, verdict.useful, self.options.floor, judge.guess, metric.higher_is_better, metric.scale,
            judge.noise, tuple(judge.unexercised), written,
        )  # fmt: skip

    def _side(
        self,
        path: Path,
        costs: dict[str, int],
        verdict: Verdict,
        latency: dict[str, dict[str, float]],
        memory: dict[str, int],
    ) -> Side:
        metric = {"name": self.judge.metric.name, "value": verdict.value} if self.judge.measured else None
        beside = self.judge.beside(open_model(path))
        return Side(str(path), costs["macs"], costs["params"], model_bytes(path), metric, beside, latency, memory)

    def _verdict(self, costs: dict[str, int], timed: Comparison, drop: float) -> dict[str, Any]:
        """What was asked, what was reached, and whether that is enough; time, which varies, may be 5 % over.

        A result that is slower than the uncut model is no success, whatever else it reaches.
        """
        reached = {name: cost / max(self.base_costs[name], 1) for name, cost in costs.items()}
        reached["latency"] = 1 / timed.speedup
        slower = timed.high < 1 / SLOWER and costs["macs"] < self.base_costs["macs"]
        asked = dict[str, dict[str, Any]]()
        for name, share in self.targets.items():
            within = share * (OVER if name == "latency" else 1)
            asked[name] = {"asked": share, "reached": reached[name], "met": bool(reached[name] <= within)}
        met = all(entry["met"] for entry in asked.values())
        if self.allowed is not None:
            met = met and drop <= self.allowed + 1e-9 and (bool(asked) or costs["macs"] < self.base_costs["macs"])
        rates = {"units": 1 - reached["units"], "weights": 1 - reached["params"]}
        return {
            "rates": rates,
            "resources": asked,
            "max_drop": self.allowed,
            "drop": drop if self.judge.measured else None,
            "slower": slower,
            "met": bool(met) and not slower,
        }


def _moves_of(record: Record) -> list[Move]:
    return [Move(**each) for each in record["moves"]]


def failed_record(proposal: Proposal, error: TrainingError) -> Record:
    """The record of a round whose training failed: nothing of it is kept."""
    nothing = {"drop": None, "drop_counted": None, "loss": None, "metric": None, "macs_share": None, "accepted": False}
    nothing["out_of_reach"] = False
    return {"tau": proposal["tau"], "progress": proposal.get("progress", 0.0), **nothing, "error": str(error)}
