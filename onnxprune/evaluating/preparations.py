"""Whether images are prepared as the model wants them: what the uncut model scores under the usual preparations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.errors import OnnxPruneError
from onnxprune.evaluating.data import Dataset, class_axis
from onnxprune.evaluating.evaluate import predict
from onnxprune.evaluating.sources import ImageFolder, ImageOptions

Array = NDArray[Any]
TRIED = 300  # images
BETTER = 0.1  # of the images, that another preparation has right and the one given hasn't
ERRORS = 3.0  # standard errors, by which it must be clear
SIZES = (32, 64, 96, 128, 160, 192, 224, 256, 299, 384)  # height and width, where the model leaves them open
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
RANGES: tuple[tuple[tuple[float, ...], tuple[float, ...], str], ...] = (  # mean, std, and what that is
    ((0.0,), (1.0,), "pixels of 0 to 1"),
    (*IMAGENET, "ImageNet's mean and deviation"),
    ((0.5,), (0.5,), "pixels of -1 to 1"),
    ((0.0,), (1 / 255,), "pixels of 0 to 255"),
    (IMAGENET[0], (1 / 255,), "pixels of 0 to 255 less ImageNet's mean"),
)


@dataclass(frozen=True)
class Tried:
    """A preparation: the options that ask for it, what it is, and the share of images that are right under it."""

    options: str
    what: str
    right: float

    def __str__(self) -> str:
        return f"{100 * self.right:.0f} % with {self.options or 'the defaults'} ({self.what})"


def tried_on_folder(path: Path, model: ir.Model, options: ImageOptions, threads: int | None) -> list[Tried]:
    """What the uncut model has right of some images of a folder with classes, as given and in the usual other ways.

    The first is as given, the others follow, the best first; empty where there are no classes.
    """
    folder = ImageFolder.of(path, model, options)
    labels = folder.labels(options)
    if labels is None:
        return []
    chosen = np.random.default_rng(0).permutation(len(folder.files))[:TRIED]
    some = replace(
        folder, files=tuple(folder.files[i] for i in chosen), classes=tuple((folder.classes or ())[i] for i in chosen)
    )
    names = sorted(set(folder.classes or ()))
    trial = _Trial(some, names, model, threads)
    given = trial.right(options, "as given")
    found = [trial.right(each, what) for each, what in _ranges(options, some.mode)]
    best = max([given, *found], key=lambda each: each[0].right)
    for start in (given, best) if best is not given else (given,):  # another range may only seem to mend a wrong size
        for change, what in [*_changes(start[1], some), *_sizes(start[1], some, model)]:
            found.append(trial.right(change, f"{start[0].what}, {what}"))
    best = max([given, *found], key=lambda each: each[0].right)
    for change, what in _label_changes(best[1], names):
        found.append(trial.right(change, f"{best[0].what}, {what}"))
    others = sorted((each[0] for each in found), key=lambda each: -each.right)
    return [given[0], *others]


class _Trial:
    """Some images of a folder, read once for each crop and size, and the model's answers, kept for each preparation."""

    def __init__(self, folder: ImageFolder, names: list[str], model: ir.Model, threads: int | None) -> None:
        self.folder, self.names, self.model, self.threads = folder, names, model, threads
        self.pixels: dict[tuple[float | None, tuple[int, int] | None], Array] = {}
        self.answers: dict[ImageOptions, Array | None] = {}

    def right(self, options: ImageOptions, what: str) -> tuple[Tried, ImageOptions]:
        """How many answers are right under these options."""
        bare = replace(options, label_order="names", label_offset=0)
        if bare not in self.answers:
            self.answers[bare] = self._run(bare)
        answers = self.answers[bare]
        order = self.names if options.label_order == "names" else None
        place = {name: order.index(name) if order is not None else int(name) for name in self.names}
        labels = np.array([place[name] for name in self.folder.classes or ()]) + options.label_offset
        right = 0.0 if answers is None else float((answers == labels).mean())
        return Tried(_as_options(options), what, right), options

    def _run(self, options: ImageOptions) -> Array | None:
        """The model's answers; None where it can't be run so."""
        seen = (options.crop, options.size)
        if seen not in self.pixels:
            folder = replace(self.folder, size=options.size or self.folder.size)
            self.pixels[seen] = np.concatenate([folder.pixels(file, options.crop) for file in folder.files])
        images = options.prepared(self.pixels[seen])
        try:
            scores = predict(self.model, Dataset({self.folder.input: images}, None), self.threads)[0]
        except OnnxPruneError:
            return None
        if scores.ndim != 2 or scores.shape[1] < 2 or class_axis(scores.shape, (len(images),)) not in (-1, 1):
            return None
        return np.asarray(scores.argmax(1))


def _ranges(options: ImageOptions, mode: str) -> Iterator[tuple[ImageOptions, str]]:
    for mean, std, what in RANGES:
        fits = tuple(values if mode == "RGB" else (float(np.mean(values)),) for values in (mean, std))
        yield replace(options, mean=fits[0], std=fits[1]), what


def _changes(options: ImageOptions, folder: ImageFolder) -> Iterator[tuple[ImageOptions, str]]:
    if folder.mode == "RGB":
        if options.channels == "rgb":
            yield replace(options, channels="bgr"), "channels as BGR"
        else:
            yield replace(options, channels="rgb"), "channels as RGB"
    if options.crop is None:
        yield replace(options, crop=0.875), "the middle cut out"


def _sizes(options: ImageOptions, folder: ImageFolder, model: ir.Model) -> Iterator[tuple[ImageOptions, str]]:
    """Other sizes, where the model's input has none of its own."""
    value = next(each for each in model.graph.inputs if each.name == folder.input)
    axes = slice(2, 4) if options.layout == "nchw" else slice(1, 3)
    if value.shape is None or any(isinstance(size, int) for size in list(value.shape)[axes]):
        return
    for size in SIZES:
        if (size, size) != folder.size:
            yield replace(options, size=(size, size)), f"{size} by {size} pixels"


def _label_changes(options: ImageOptions, names: Sequence[str]) -> Iterator[tuple[ImageOptions, str]]:
    for offset in (-1, 1):
        yield replace(options, label_offset=options.label_offset + offset), f"classes moved by {offset:+d}"
    if options.label_order == "names" and all(name.isdecimal() for name in names):
        yield replace(options, label_order="numbers"), "sub-folders named by the numbers of classes"


def _as_options(options: ImageOptions) -> str:
    """The command-line options that say this."""
    parts = []
    for name, default in vars(ImageOptions()).items():
        value = getattr(options, name)
        if value != default:
            between = " " if name == "size" else ","
            text = between.join(f"{each:.6g}" for each in value) if isinstance(value, tuple) else f"{value}"
            parts.append(f"--{name.replace('_', '-')} {text}")
    return " ".join(parts)


def clearly_better(tried: Sequence[Tried], images: int = TRIED) -> Tried | None:
    """The best other preparation, where it is clearly better than the first, the one that was given."""
    if len(tried) < 2:
        return None
    given, best = tried[0], tried[1]
    share = (given.right + best.right) / 2
    error = (2 * share * (1 - share) / max(images, 1)) ** 0.5
    return best if best.right - given.right > max(BETTER, ERRORS * error) else None
