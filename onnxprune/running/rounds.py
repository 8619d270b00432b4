"""The rounds: threshold, cut, repair, fine-tune, evaluate, accept or roll back.

Every step that takes long leaves its result in the run folder, and every decision is a pure function of those results.
Resuming is running again: what is there isn't computed twice.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.benchmarking.bench import find_providers
from onnxprune.benchmarking.latency import time_share
from onnxprune.choosing.layers import drop_layers
from onnxprune.choosing.threshold import Move, drawn, said
from onnxprune.cutting.cut import cut
from onnxprune.cutting.plan import Plan, load_plan
from onnxprune.cutting.verify import check_cut
from onnxprune.errors import TrainingError
from onnxprune.evaluating.judge import Verdict
from onnxprune.exporting.finalise import PADS_APART, pads_before_convolutions
from onnxprune.graph.files import memoised, sha256, write_json
from onnxprune.graph.model import open_model, save_model
from onnxprune.graph.threads import number_of_threads
from onnxprune.labels import analyse
from onnxprune.labels.units import Units, chosen_units, fading_parts, find_units, granularity_for, weight_matrix
from onnxprune.repairing.find import Repaired
from onnxprune.running.context import Context, Proposal, Record, State, costs_of
from onnxprune.running.ending import good_enough, report_of, save
from onnxprune.running.proposals import CHECK_SECONDS, SLOWER, alive_of, propose
from onnxprune.running.report import Report, decimals
from onnxprune.running.trials import uncut
from onnxprune.scoring.cost import Alive
from onnxprune.scoring.score import weight_values
from onnxprune.training import TrainingOptions, choose_trainer, fine_tune, prepare_trainer

TOLD = ("tau", "before", "moves", "scores", "layers", "removed", "removed_layers")  # a round's record of its threshold


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
            return report_of(self, state, records, started)
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
        save(self, state)
        if not good_enough(self, state.useful):
            return f"what was accepted is of little use, and is in {self.folder} only"
        save_model(open_model(self.folder / "pruned.onnx"), self.output)
        return f"the best accepted model is in {self.output}"

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
        repaired = self.judge.measure(model)
        model, verdict, epochs = self._tuned_if_better(number, folder, model, state.plan.then(step), repaired)
        record = {
            "round": number,
            **{name: proposal[name] for name in TOLD},
            "progress": self._progress(costs, proposal),
            "out_of_reach": proposal.get("out_of_reach", False),
            "macs_share": costs["macs"] / max(self.base_costs["macs"], 1),
            **costs,
            **self._judged(repaired, verdict),
            "epochs": epochs,
            "trainer": choose_trainer(self.trainer) if self.epochs else None,
            "check": checked.outcome,
            "check_why": checked.why,
            "repair": [each.to_json() for each in layers],
            "norms": _norms(model),
            "widths": {group.name: int(alive[group.units].sum()) * group.repeats for group in units.groups},
            "seconds": time.monotonic() - started,
        }
        return record, State(model, state.plan.then(step))

    def _judged(self, repaired: Verdict, verdict: Verdict) -> Record:
        """What a round's record says of quality, before and after fine-tuning."""
        return {
            "metric_before_tuning": repaired.value,
            "drop_before_tuning": repaired.drop,
            "metric": verdict.value,
            "drop": verdict.drop,
            "loss": verdict.loss,
            "tuned": verdict is not repaired,
            "drop_error": verdict.error,
            "drop_counted": verdict.most,
            "useful": verdict.useful,
            "fidelity": verdict.fidelity,
            "accepted": self.allowed is None or verdict.most <= self.allowed,
        }

    def _tuned_if_better(
        self, number: int, folder: Path, model: ir.Model, plan: Plan, repaired: Verdict
    ) -> tuple[ir.Model, Verdict, int]:
        """The model fine-tuned, or as it was repaired where that is better; the verdict on it, and epochs trained."""
        if not self.epochs:
            return model, repaired, 0
        tuned, after, epochs = self._tuned(number, folder, model, plan)
        name = self.judge.metric.name
        if not self._better(after, repaired):
            places = decimals(after.value, repaired.value)
            self.note(
                f"round {number}: fine-tuning was undone: {name} {after.value:.{places}f} after it, "
                f"{repaired.value:.{places}f} before"
            )
            return model, repaired, epochs
        if (after.drop, after.loss) > (repaired.drop, repaired.loss):
            self.note(
                f"round {number}: tuning is kept although {name} fell: what is held back of --data may be known by "
                "heart, which tuning unlearns; --eval-data tells"
            )
        return tuned, after, epochs

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
        if self.judge.fair:
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


def _norms(model: ir.Model) -> dict[str, float]:
    """The L2 norm of each weight, by name."""
    values = dict.fromkeys(weight_values(model))
    return {value.name or "": float(np.linalg.norm(weight_matrix(value))) for value in values}


def _moves_of(record: Record) -> list[Move]:
    return [Move(**each) for each in record["moves"]]


def failed_record(proposal: Proposal, error: TrainingError) -> Record:
    """The record of a round whose training failed: nothing of it is kept."""
    nothing = {"drop": None, "drop_counted": None, "loss": None, "metric": None, "macs_share": None, "accepted": False}
    nothing["out_of_reach"] = False
    return {"tau": proposal["tau"], "progress": proposal.get("progress", 0.0), **nothing, "error": str(error)}
