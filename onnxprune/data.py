"""Data: what the user gives, checked against the model before any work, and random inputs where there is none."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from onnxprune.errors import DataError, ModelError
from onnxprune.shapes import dynamic_sizes, input_shape

Array = NDArray[Any]
IGNORED = -1  # the class label of what doesn't count
ALIASES = ("input", "x", "images")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class ImageOptions:
    """How a folder of images becomes arrays: (pixels / 255 - mean) / std, resized to `size` (height, width)."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None
    layout: str = "nchw"


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
        """The samples at these indices."""
        labels = None if self.labels is None else self.labels[indices]
        inputs, others = ({name: array[indices] for name, array in kind.items()} for kind in (self.inputs, self.others))
        return Dataset(inputs, labels, others)

    def labels_of(self, name: str) -> Array | None:
        """The labels of an output, or of the first one for ""; None when there are none."""
        return self.others.get(name) if name else self.labels

    def split(self, share: float, seed: int) -> tuple[Dataset, Dataset]:
        """Shuffles by the seed and holds back `share` of the samples (at least one): (the rest, held back)."""
        order = np.random.default_rng(seed).permutation(len(self))
        held = max(1, round(share * len(self)))
        return self.take(np.sort(order[held:])), self.take(np.sort(order[:held]))

    def digest(self) -> str:
        """SHA-256 of all arrays, for telling whether a resumed run has the same data."""
        total = hashlib.sha256()
        for name, array in [*sorted(self.inputs.items()), *sorted(self.others.items())]:
            total.update(name.encode())
            total.update(np.ascontiguousarray(array).data)
        if self.labels is not None:
            total.update(np.ascontiguousarray(self.labels).data)
        return total.hexdigest()


def load_data(source: str, model: ir.Model, images: ImageOptions | None = None, ignored: int | None = None) -> Dataset:
    """Reads data and checks it against a model's inputs and output.

    Class labels of the value `ignored` don't count; they come out as -1.

    `source` is an .npz file, a folder with one sub-folder of images for each class, or `module:function` returning an
    iterable of dicts of arrays. Raises `DataError` naming the array for wrong names, shapes, dtypes, counts or labels,
    no samples, and NaNs or infinities.
    """
    path = Path(source)
    if path.is_dir():
        arrays = _from_folder(path, model, images or ImageOptions())
    elif path.is_file() or source.endswith((".npz", ".npy")):
        arrays = _from_npz(path)
    elif ":" in source:
        arrays = _from_function(source)
    else:
        raise DataError(f"{source}: no such file or folder; give an .npz, a folder of images or module:function")
    return check_data(arrays, model, source, ignored)


def _from_npz(path: Path) -> dict[str, Array]:
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise DataError(f"{path}: holds a single array; save arrays by name with numpy.savez")
        with file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not an .npz file that can be read: {str(error).splitlines()[0]}") from error


def load_function(name: str) -> Callable[..., Any]:
    """The function that `module:function` names. Raises `DataError` when there is none."""
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{name}: {error}; give module:function, importable from the current folder") from error
    if not callable(function):
        raise DataError(f"{name}: not a function")
    return function  # type: ignore[no-any-return]


def _from_function(source: str) -> dict[str, Array]:
    try:
        rows = list(load_function(source)())
        names = list(rows[0]) if rows else []
        return {name: np.concatenate([np.asarray(row[name]) for row in rows]) for name in names}
    except DataError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"{source}: {type(error).__name__}: {error}; it must return dicts of batched arrays") from error


def _from_folder(path: Path, model: ir.Model, options: ImageOptions) -> dict[str, Array]:
    value = model_inputs(model)[0]
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir())
    files = [
        (file, label)
        for label, folder in enumerate(classes)
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise DataError(f"{path}: no images in sub-folders; put the images of each class into a folder of its own")
    shape = list(value.shape or ())
    first, second, channels = (2, 3, 1) if options.layout == "nchw" else (1, 2, 3)
    size = options.size
    if size is None and len(shape) == 4 and isinstance(shape[first], int) and isinstance(shape[second], int):
        size = (int(str(shape[first])), int(str(shape[second])))
    if size is None or len(shape) != 4:
        raise DataError(f"{path}: the image size can't be read off input {value.name!r}; give --size HEIGHT WIDTH")
    mode = "L" if shape[channels] == 1 else "RGB"
    mean, std = np.array(options.mean, np.float32), np.array(options.std, np.float32)
    stack = np.empty((len(files), *size, 1 if mode == "L" else 3), np.float32)
    for index, (file, _) in enumerate(files):
        try:
            pixels = Image.open(file).convert(mode).resize((size[1], size[0]), Image.Resampling.BILINEAR)
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{file}: not an image that can be read: {error}") from error
        stack[index] = (np.asarray(pixels, np.float32).reshape(*size, -1) / 255 - mean) / std
    if options.layout == "nchw":
        stack = np.ascontiguousarray(stack.transpose(0, 3, 1, 2))
    return {value.name or "": stack, "labels": np.array([label for _, label in files], np.int64)}


def model_inputs(model: ir.Model) -> list[ir.Value]:
    """The inputs that a caller has to give."""
    return [value for value in model.graph.inputs if not value.is_initializer()]


def check_data(
    arrays: Mapping[str, Array], model: ir.Model, source: str = "data", ignored: int | None = None
) -> Dataset:
    """Arrays as a `Dataset`, after checking them. Raises `DataError` naming the array that doesn't fit.

    `labels` are those of the first output, `labels.NAME` those of another output, or what a loss of that input reads.
    """
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
    if array.dtype.kind == "f" and not np.isfinite(array).all():
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


def random_inputs(model: ir.Model, seed: int, batch: int | None = 2, walk: int = 0) -> dict[str, Array]:
    """Signed random inputs for a model: normal for floats, small non-negative integers for the rest.

    A dynamic first axis has `batch` samples, other dynamic axes (without `batch` all) the sizes of a shape walk.
    Raises `ModelError` for an input that isn't a tensor with a known rank.
    """
    rng = np.random.default_rng(seed)
    sizes = dynamic_sizes(model, walk)
    inputs: dict[str, Array] = {}
    for value in model_inputs(model):
        if value.dtype is None or value.shape is None or not isinstance(value.type, ir.TensorType):
            raise ModelError(f"input {value.name!r} isn't a tensor of known rank; export the model with input shapes")
        shape = list(input_shape(value, sizes))
        if batch is not None and shape and not isinstance(value.shape[0], int):
            shape[0] = batch
        dtype = value.dtype.numpy()
        if value.dtype.is_floating_point():
            inputs[value.name or ""] = rng.standard_normal(shape).astype(dtype)
        else:
            inputs[value.name or ""] = rng.integers(0, 2, shape).astype(dtype)
    return inputs


def random_dataset(model: ir.Model, count: int, seed: int) -> Dataset:
    """Signed random samples without labels, for models that come without data."""
    batch = fixed_batch(model)
    if batch is None:
        return Dataset(random_inputs(model, seed, count), None)
    parts = [random_inputs(model, seed + i) for i in range(-(-count // batch))]
    return Dataset({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, None)


def as_dataset(
    source: str | Mapping[str, Array] | Iterable[Any],
    model: ir.Model,
    images: ImageOptions | None,
    ignored: int | None = None,
) -> Dataset:
    """A `Dataset` from what a caller of the Python API may give: a source as for `load_data`, or a dict of arrays."""
    if isinstance(source, str | os.PathLike):
        return load_data(str(source), model, images, ignored)
    if isinstance(source, Mapping):
        return check_data(source, model, ignored=ignored)
    raise DataError(f"data must be a path, module:function or a dict of arrays, not {type(source).__name__}")
