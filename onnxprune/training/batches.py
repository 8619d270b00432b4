"""What a training step is given: shuffled batches, augmented or mixed, and a part that is held out of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def augment(batch: Array, flip: bool, shift: int, layout: str, rng: np.random.Generator) -> Array:
    """Mirrors half of the images and moves each by up to `shift` pixels, filling with zeros."""
    rows, columns = (2, 3) if layout == "nchw" else (1, 2)
    if flip:
        mirrored = rng.random(len(batch)) < 0.5
        batch = np.where(mirrored.reshape(-1, 1, 1, 1), np.flip(batch, columns), batch)
    if shift:
        widths = [(0, 0)] * batch.ndim
        widths[rows] = widths[columns] = (shift, shift)
        padded = np.pad(batch, widths)
        moves = rng.integers(0, 2 * shift + 1, (len(batch), 2))
        height, width = batch.shape[rows], batch.shape[columns]
        where: list[Any] = [slice(None)] * 3
        result = np.empty_like(batch)
        for i, (down, right) in enumerate(moves):
            where[rows - 1], where[columns - 1] = slice(down, down + height), slice(right, right + width)
            result[i] = padded[i][tuple(where)]
        batch = result
    return batch


class Batches:
    """The batches of a training job, each a pure function of the job's seed and the step."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.job = job
        self.data = {name: np.load(path, mmap_mode="r") for name, path in job["inputs"].items()}
        self.labels = {name: np.load(path, mmap_mode="r") for name, path in job["labels"].items()}
        order = np.random.default_rng(job["seed"]).permutation(len(next(iter(self.data.values()))))
        self.held, self.samples = np.sort(order[: job["held"]]), order[job["held"] :]
        self.size = min(job["batch"], len(self.samples))
        self.per_epoch = len(self.samples) // self.size

    def at(self, step: int) -> dict[str, Array]:
        """The inputs and labels of a step of training."""
        epoch, index = divmod(step, self.per_epoch)
        shuffled = np.random.default_rng([self.job["seed"], epoch]).permutation(self.samples)
        chosen = np.sort(shuffled[index * self.size : (index + 1) * self.size])
        return self.take(chosen, np.random.default_rng([self.job["seed"], epoch, index]))

    def take(self, chosen: Array, rng: np.random.Generator | None = None) -> dict[str, Array]:
        """The inputs and labels of these samples, augmented where there is randomness for it."""
        feeds = {name: np.asarray(array[chosen]) for name, array in self.data.items()}
        if rng is not None and (self.job["flip"] or self.job["shift"]):
            name = next(iter(feeds))
            feeds[name] = augment(feeds[name], self.job["flip"], self.job["shift"], self.job["layout"], rng)
        feeds |= {name: np.asarray(array[chosen]) for name, array in self.labels.items()}
        return {**feeds, **self._mixture(feeds, len(chosen), rng)} if self.job["mix"] else feeds

    def _mixture(self, feeds: dict[str, Array], size: int, rng: np.random.Generator | None) -> dict[str, Array]:
        """Each sample mixed with another, in a share that is the same in the batch; without randomness, with itself."""
        other, share = np.arange(size), np.float32(1)
        if rng is not None:
            other, share = rng.permutation(size), np.float32(rng.beta(self.job["mix"], self.job["mix"]))
        mixed = {name: share * feeds[name] + (1 - share) * feeds[name][other] for name in self.data}
        labels = {name + ".other": feeds[name][other] for name in self.labels}
        return {**mixed, **labels, "onnxprune.mixed": np.full(size, share, np.float32)}
