"""What a run is given and asked, and what follows from that: shared by trials, proposals and rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxprune.benchmarking.bench import find_providers
from onnxprune.benchmarking.probe import CPU, REFERENCE, Probe, probe
from onnxprune.choosing.select import Rounding
from onnxprune.choosing.sensitivity import load_sensitivity
from onnxprune.cutting.plan import Plan, Reordering
from onnxprune.evaluating.data import Dataset, model_inputs
from onnxprune.evaluating.judge import Judge
from onnxprune.labels.units import Units
from onnxprune.progress import Listener
from onnxprune.repairing.find import Repaired
from onnxprune.repairing.reconstruct import reconstruct
from onnxprune.repairing.repair import reestimate_batch_norm, undo_if_worse
from onnxprune.running.options import RESOURCES, Allowance, RunOptions
from onnxprune.scoring.cost import Alive, Cost, Spending
from onnxprune.scoring.score import Origin, origin_of
from onnxprune.training.client import BATCH, choose_augmentation
from onnxprune.training.runtime import Trainer, has_cuda

WITHOUT_DATA = 0.75  # share of the MACs to keep when nothing can be measured
ROUNDS = 6  # when not given, for runs that an allowed drop alone ends
STEPS_A_ROUND = 1000  # fine-tuning steps that epochs are chosen for when they aren't given
ENDLESS = 10_000  # epochs, where time decides
TRIED_ON = 0.25  # of the samples and positions that repair takes, for cuts that are only tried
WORTH_A_GPU = 3e8  # MACs of a step's forward pass; below that launching operators takes longer than the CPU does

Proposal = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class State:
    """What is accepted so far: a model, the plan that leads to it from the baseline, and whether it was fine-tuned.

    `useful` is how much is left of what the uncut model has above guessing.
    """

    model: ir.Model
    plan: Plan
    tuned: bool = False
    useful: float = 1.0


@dataclass(frozen=True)
class Context:
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
    options: RunOptions
    listener: Listener
    notes: list[str]

    @cached_property
    def targets(self) -> dict[str, float]:
        """The shares that may remain, by resource; empty when the allowed drop alone decides."""
        return self.options.targets or ({} if self.judge.measured else {"macs": WITHOUT_DATA})

    @cached_property
    def allowed(self) -> float | None:
        """How much of the metric may be lost, in its unit; None when any may.

        When there is data and nothing else was asked, that is a hundredth of the metric's scale; of an error, which has
        none, a hundredth of what lies between the uncut model and the best constant answer.
        """
        asked, metric = Allowance.of(self.options.max_drop), self.judge.metric
        if asked is not None:
            return asked.within(self.judge.uncut, metric.scale)
        if self.targets:
            return None
        if metric.scale is not None or self.judge.guess is None:
            return Allowance(1.0).within(self.judge.uncut, metric.scale)
        return metric.drop(self.judge.uncut, self.judge.guess) / 100

    @cached_property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the inputs that times are measured on: a sample of the data, or as many as the model wants."""
        found = dict[str, tuple[int, ...]]()
        for value in model_inputs(self.baseline):
            name, first = value.name or "", (value.shape or [None])[0]
            rest = self.judge.evaluation.inputs[name].shape[1:]
            found[name] = (first if isinstance(first, int) else 1, *rest)
        return found

    @cached_property
    def layers(self) -> int | Literal["auto"]:
        """How many layers may be dropped: as many as pay, where there is data to tell, or time is what counts.

        Of time they save most, and inputs that were made up tell of that, too.
        """
        if self.options.layers is not None:
            return self.options.layers
        told = self.judge.measured or (self.options.target_latency is not None and self.calibration is not None)
        return "auto" if self.options.layer_norm is not None or (told and self.options.prices) else 0

    @cached_property
    def epochs(self) -> int:
        """Epochs of fine-tuning in each round."""
        if self.train is None:
            return 0
        if self.options.epochs is not None:
            return self.options.epochs
        if self.options.minutes is not None:
            return ENDLESS
        return int(np.clip(round(STEPS_A_ROUND * (self.options.batch or BATCH) / len(self.train)), 2, 60))

    @cached_property
    def trainer(self) -> Trainer:
        """What trains: a GPU by itself where there is one and a step is long enough for it."""
        long = self.base_costs["macs"] * (self.options.batch or BATCH) >= WORTH_A_GPU
        return "cuda" if self.options.trainer == "auto" and long and has_cuda() else self.options.trainer

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

    def spending(self, units: Units) -> Spending:
        """What counts as cost: what has a target; where the allowed drop alone decides, time on a reference machine."""
        resources, target = tuple(self.targets) or ("latency",), self.target or REFERENCE
        return Spending(units, resources, target, Spending(self.units, resources, target).whole)

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

    def note(self, text: str) -> None:
        """Something the user should know; it stands in the report too."""
        self.notes.append(text)
        self.listener.note(text)

    def round_folder(self, number: int) -> Path:
        """Where a round keeps its files."""
        folder = self.folder / f"round-{number:02d}"
        folder.mkdir(exist_ok=True)
        return folder

    @property
    def memory(self) -> int | None:
        """Bytes that repair may hold."""
        return self.options.memory and self.options.memory << 20

    def reference(self, state: State, step: Plan) -> tuple[ir.Model, Plan]:
        """What a cut is repaired towards, and what it lost of that: the uncut model, or what was fine-tuned since."""
        return (state.model, step) if state.tuned else (self.baseline, state.plan.then(step))

    def repair(
        self,
        model: ir.Model,
        state: State,
        step: Plan,
        progress: Callable[[int, int], None] = lambda *_: None,
        note: Callable[[str], None] = lambda _: None,
        share: float = 1.0,
    ) -> list[Repaired]:
        """What can be done without training: layers fitted to those before the cut, or else batch normalisation.

        In the first round those before the cut are the uncut model's, in later ones those that were fine-tuned since.
        It takes a `share` of the samples and positions that it can. Returns what became of each layer; nothing where
        all was undone.
        """
        if self.calibration is None:
            return []
        (whole, plan), before = self.reference(state, step), model.clone()
        threads = self.options.threads
        done = reconstruct(model, whole, plan, self.calibration, threads, progress, self.memory, note, share)
        if all(each.gained is None for each in done):
            reestimate_batch_norm(model, self.calibration, self.options.threads)
        if undo_if_worse(model, before, whole, self.calibration, self.options.threads):
            note("repair took the outputs further from the uncut ones, and was undone")
            return []
        return done


def costs_of(units: Units, alive: Alive | None = None, target: Probe | None = None) -> dict[str, int]:
    """MACs, parameters and bytes of what survives, of all without `alive`; and the estimated time on a target."""
    alive = np.ones(units.count, bool) if alive is None else alive
    measures = Cost(units, target).measures
    return {name: measures[name](alive) for name in RESOURCES if name != "latency" or target is not None}
