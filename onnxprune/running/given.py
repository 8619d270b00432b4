"""What a run is given: the data, read and split; the uncut model, looked at before any work."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.errors import DataError, TrainingError, UsageError
from onnxprune.evaluating.data import Dataset, random_dataset
from onnxprune.evaluating.judge import Judge
from onnxprune.evaluating.preparations import TRIED, Tried, clearly_better, tried_on_folder
from onnxprune.evaluating.sources import ImageFolder, ImageOptions, as_dataset
from onnxprune.graph.threads import number_of_threads
from onnxprune.labels.units import Units
from onnxprune.progress import Listener
from onnxprune.running.context import costs_of
from onnxprune.running.options import RunOptions
from onnxprune.training.synthesise import noise_dataset, synthetic_dataset
from onnxprune.training.worker import write_arrays

HELD_BACK = 0.2  # share of the samples for decisions, when no evaluation data is given, but at most
FEW_HELD = 16  # samples from which something can be told
MOST_HELD, MOST_MEASURED = 5000, 1000  # where the drop decides, and where it is only measured


Data = str | Sequence[str] | Mapping[str, NDArray[Any]]


def looked_at(judge: Judge, notes: list[str], folders: list[Path], images: ImageOptions) -> Judge:
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


def folders_of(given: Data | None) -> list[Path]:
    """The data that are folders of images."""
    return [] if isinstance(given, Mapping) else [path for path in paths_of(given) if path.is_dir()]


def paths_of(places: str | os.PathLike[str] | Sequence[str] | None) -> list[Path]:
    """What may be paths, resolved."""
    single = [places] if isinstance(places, str | os.PathLike) else places or []
    return [Path(each).resolve() for each in single]


def load(
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
    for path in {*folders_of(data), *folders_of(eval_data)}:
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


def made_up(
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
