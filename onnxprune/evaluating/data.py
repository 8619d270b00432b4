"""Samples: checked against the model before any work, and random inputs where there are none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.errors import DataError, ModelError, UsageError
from onnxprune.graph.shapes import dynamic_sizes, input_shape

Array = NDArray[Any]
IGNORED = -1  # the class label of what doesn't count
ALIASES = ("input", "x", "images")
CHUNK = 1024  # rows read at a time


class StoredArray:
    """An array whose rows lie in one or several files, in an order of its own, and are read when asked for.

    It stands in for a NumPy array where only rows are taken of one; anything else reads it whole.
    """

    def __init__(self, parts: Sequence[Array], order: NDArray[np.int64] | None = None) -> None:
        self.parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.order = np.arange(self._starts[-1]) if order is None else order
        self.shape, self.dtype = (len(self.order), *parts[0].shape[1:]), parts[0].dtype
        self.ndim, self.size = len(self.shape), int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> Array:
        wanted = self.order[rows]
        where = np.searchsorted(self._starts, wanted, "right") - 1
        result = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        for index in np.unique(where):
            chosen = where == index
            result[chosen] = self.parts[index][wanted[chosen] - self._starts[index]]
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self[:].astype(dtype or self.dtype, copy=False)

    def take(self, rows: NDArray[np.int64]) -> StoredArray:
        """The rows at these indices, still where they lie."""
        return StoredArray(self.parts, self.order[rows])


@dataclass(frozen=True)
class Dataset:
    """Samples along the first axis of every array; `labels` is None when there are none.

    Labels are of the model's first output; `others` are those of further outputs, or what a loss reads, by name.
    """

    inputs: dict[str, Array]
    labels: Array | None
    others: dict[str, Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, indices: NDArray[np.int64] | slice) -> Dataset:
        """The samples at these indices; those in files stay there, but slices are read."""

        def rows(array: Any) -> Any:
            stays = isinstance(array, StoredArray) and not isinstance(indices, slice)
            return array.take(indices) if stays else array[indices]

        inputs = {name: rows(array) for name, array in self.inputs.items()}
        others = {name: array[indices] for name, array in self.others.items()}
        return Dataset(inputs, None if self.labels is None else self.labels[indices], others)

    def shuffled(self, seed: int) -> Dataset:
        """The samples in an order decided by the seed: the first ones then speak for all."""
        return self.take(np.random.default_rng(seed).permutation(len(self)))

    def labels_of(self, name: str) -> Array | None:
        """The labels of an output, or of the first one for ""; None when there are none."""
        return self.others.get(name) if name else self.labels

    def split(self, share: float, seed: int) -> tuple[Dataset, Dataset]:
        """Shuffles by the seed and holds back `share` of the samples (at least one): (the rest, held back)."""
        held, shuffled = max(1, round(share * len(self))), self.shuffled(seed)
        return shuffled.take(np.arange(held, len(self))), shuffled.take(slice(0, held))

    def digest(self) -> str:
        """SHA-256 of all arrays, for telling whether a resumed run has the same data."""
        total = hashlib.sha256()
        for name, array in [*sorted(self.inputs.items()), *sorted(self.others.items())]:
            total.update(name.encode())
            for rows in chunks(array):
                total.update(np.ascontiguousarray(rows).data)
        if self.labels is not None:
            total.update(np.ascontiguousarray(self.labels).data)
        return total.hexdigest()


def chunks(array: Array) -> Iterator[Array]:
    """The rows of an array, some at a time."""
    for start in range(0, len(array), CHUNK):
        yield array[start : start + CHUNK]


def model_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that a caller has to give."""
    return [value for value in model.graph.inputs if not value.is_initializer()]


def check_samples(model: ir.Model) -> None:
    """Raises `ModelError` where an input has no samples along its first axis, or not as many as the first input."""
    values = model_inputs(model)
    first = list(values[0].shape or ()) if values else []
    for value in values:
        shape = list(value.shape) if value.shape is not None else first
        here, there = shape[:1], first[:1]
        fixed = bool(here) and isinstance(here[0], int) and here != there
        named = [str(dim.value) for dim in there if isinstance(dim, ir.SymbolicDim) and dim.value]
        elsewhere = here != there and any(str(dim) in named for dim in shape[1:])
        if not here or fixed or elsewhere:
            raise ModelError(
                f"input {value.name!r} of shape ({', '.join(map(str, shape))}) doesn't have one row for each sample of "
                f"{values[0].name!r}: such a model can be cut by its weights ('onnxprune prune'), but not measured on "
                "data"
            )


def check_data(
    arrays: Mapping[str, Array], model: ir.Model, source: str = "data", ignored: int | None = None
) -> Dataset:
    """Arrays as a `Dataset`, after checking them. Raises `DataError` naming the array that doesn't fit.

    `labels` are those of the first output, `labels.NAME` those of another output, or what a loss of that input reads.
    """
    check_samples(model)
    values = model_inputs(model)
    outputs = {value.name or "": value for value in model.graph.outputs}
    names = [value.name or "" for value in values]
    given, labels, counts = dict(arrays), dict[str, Array](), dict[str, int]()
    for name in [name for name in given if name.split(".")[0] == "labels" and name not in names]:
        array, output = given.pop(name), name.removeprefix("labels").removeprefix(".") or next(iter(outputs))
        labels[output] = _checked_labels(array, outputs.get(output), f"{source}: array {name!r}", ignored)
        counts[name] = len(array)
    if len(values) == 1 and (values[0].name or "") not in given:
        alias = next((name for name in ALIASES if name in given), None)
        if alias is not None:
            given[values[0].name or ""] = given.pop(alias)
    missing = [name for name in names if name not in given]
    if missing:
        raise DataError(f"{source}: no array {missing[0]!r}; the model's inputs are {names}, found {sorted(given)}")
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise DataError(f"{source}: array {unknown[0]!r} is no input of the model; its inputs are {names}")
    for value in values:
        _check_array(given[value.name or ""], value, source)
    counts = {name: len(array) for name, array in given.items()} | counts
    if len(set(counts.values())) > 1:
        raise DataError(f"{source}: arrays differ in their number of samples: {counts}")
    if not next(iter(counts.values())):
        raise DataError(f"{source}: no samples in array {names[0]!r}")
    return Dataset({name: given[name] for name in names}, labels.pop(next(iter(outputs)), None), labels)


def _check_array(array: Array, value: ir.Value, source: str) -> None:
    shape = list(value.shape or ())
    where = f"{source}: array {value.name!r}"
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        raise DataError(f"{where} is {array.dtype}, the model wants {value.dtype.numpy()}; convert it first")
    wanted = [dim if isinstance(dim, int) and axis else None for axis, dim in enumerate(shape)]
    fits = array.ndim == len(shape) and all(w in (None, d) for w, d in zip(wanted, array.shape, strict=True))
    if not fits:
        described = ["N", *[str(dim) for dim in shape[1:]]]
        raise DataError(f"{where} has shape {array.shape}, the model wants ({', '.join(described)})")
    if array.dtype.kind == "f" and not all(np.isfinite(rows).all() for rows in chunks(array)):
        raise DataError(f"{where} holds NaNs or infinities; remove those samples")


def _checked_labels(labels: Array, output: ir.Value | None, where: str, ignored: int | None) -> Array:
    """Labels as they are, or with those that don't count marked."""
    if output is None and labels.dtype.kind in "biu":
        return labels  # what a loss of the user's own reads
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise DataError(f"{where} holds NaNs or infinities; remove those samples")
        return labels
    if labels.dtype.kind not in "iu":
        raise DataError(f"{where} is {labels.dtype}; give class indices (int64) or float targets")
    if ignored is not None:
        labels = np.where(labels == ignored, IGNORED, labels.astype(np.int64))
    counted = labels if ignored is None else labels[labels != IGNORED]
    shape = list(output.shape or ()) if output is not None else []
    size = shape[class_axis(shape, labels.shape)] if shape else None
    classes = size if isinstance(size, int) else None
    if counted.size and (counted.min() < 0 or (classes is not None and counted.max() >= classes)):
        known = f"0 to {classes - 1}" if classes is not None else "0 or more"
        hint = "" if ignored is not None else "; --ignore-index names a label that doesn't count"
        raise DataError(
            f"{where} goes from {counted.min()} to {counted.max()}, but the model's classes are {known}{hint}"
        )
    return labels


def class_axis(shape: Sequence[Any], labels_shape: Sequence[int]) -> int:
    """The axis of class scores: the last, or 1 where only that is the one that class labels lack (N, C, height, width).

    Dimensions of `shape` that aren't numbers fit any.
    """
    if len(shape) < 3 or len(labels_shape) != len(shape) - 1:
        return -1

    def fits(sizes: Sequence[Any]) -> bool:
        return all(not isinstance(a, int) or a == b for a, b in zip(sizes, labels_shape[1:], strict=True))

    return 1 if fits(shape[2:]) and not fits(shape[1:-1]) else -1


def fixed_batch(model: ir.Model) -> int | None:
    """The batch size that a model insists on, or None when it takes any."""
    shape = model_inputs(model)[0].shape
    return shape[0] if shape is not None and len(shape) and isinstance(shape[0], int) else None


def batches(data: Dataset, size: int) -> Iterator[dict[str, Array]]:
    """The inputs of a data set in batches, in order; the last may be smaller."""
    for start in range(0, len(data), size):
        yield {name: array[start : start + size] for name, array in data.inputs.items()}


def random_inputs(
    model: ir.Model,
    seed: int,
    batch: int | None = 2,
    walk: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Array]:
    """Signed random inputs for a model: normal for floats, small non-negative integers for the rest.

    A dynamic first axis has `batch` samples, other dynamic axes (without `batch` all) the sizes of a shape walk; inputs
    in `shapes` have theirs. Raises `ModelError` for an input that isn't a tensor with a known rank, and `UsageError`
    for a shape that doesn't fit.
    """
    rng = np.random.default_rng(seed)
    sizes = dynamic_sizes(model, walk)
    inputs: dict[str, Array] = {}
    if unknown := sorted({*(shapes or {})} - {value.name for value in model_inputs(model)}):
        raise UsageError(f"no input is called {unknown[0]!r}; the model has {[v.name for v in model_inputs(model)]}")
    for value in model_inputs(model):
        if value.dtype is None or value.shape is None or not isinstance(value.type, ir.TensorType):
            raise ModelError(f"input {value.name!r} isn't a tensor of known rank; export the model with input shapes")
        shape = list(input_shape(value, sizes))
        if batch is not None and shape and not isinstance(value.shape[0], int):
            shape[0] = batch
        if (given := (shapes or {}).get(value.name or "")) is not None:
            wanted = list(value.shape)
            if len(given) != len(wanted) or any(
                isinstance(w, int) and w != g for w, g in zip(wanted, given, strict=True)
            ):
                raise UsageError(f"input {value.name!r} takes {list(map(str, wanted))}, not {list(given)}")
            shape = list(given)
        dtype = value.dtype.numpy()
        if value.dtype.is_floating_point():
            inputs[value.name or ""] = rng.standard_normal(shape).astype(dtype)
        else:
            inputs[value.name or ""] = rng.integers(0, 2, shape).astype(dtype)
    return inputs


def random_dataset(model: ir.Model, count: int, seed: int) -> Dataset:
    """Signed random samples without labels, for models that come without data. Raises as `check_samples` does."""
    check_samples(model)
    batch = fixed_batch(model)
    if batch is None:
        return Dataset(random_inputs(model, seed, count), None)
    parts = [random_inputs(model, seed + i) for i in range(-(-count // batch))]
    return Dataset({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, None)
