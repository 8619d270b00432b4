"""Where samples come from: .npz files, folders of images, and functions of the user's."""

from __future__ import annotations

import importlib
import os
import struct
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_type_hints

import numpy as np
import onnx_ir as ir
from PIL import Image, UnidentifiedImageError

from onnxprune.checks import check_option
from onnxprune.errors import DataError, UsageError
from onnxprune.evaluating.data import Array, Dataset, StoredArray, check_data, model_inputs

PIECE = 2**20  # bytes read at a time
NAME_SIZES = 26  # where the header of a file in a zip archive has the lengths of its name and extra fields
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class ImageOptions:
    """How a folder of images becomes arrays: (pixels / 255 - mean) / std, resized to `size` (height, width).

    With `crop` the shorter side is resized to the size divided by it, and the middle is cut out; without, images are
    squeezed to the size. `label_order` says which class a sub-folder is: its place among the sorted names, or the
    number that is its name; `label_offset` is added to it.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] | None = None
    layout: Literal["nchw", "nhwc"] = "nchw"
    channels: Literal["rgb", "bgr"] = "rgb"
    crop: float | None = None
    label_order: Literal["names", "numbers"] = "names"
    label_offset: int = 0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(ImageOptions).items():
            check_option(name, getattr(self, name), hint)
        if not all(each > 0 for each in self.std):
            raise UsageError(f"--std {self.std}: give numbers above 0")
        if self.crop is not None and not 0 < self.crop <= 1:
            raise UsageError(f"--crop {self.crop:g}: give the share of the shorter side to keep, above 0 and at most 1")

    def prepared(self, pixels: Array) -> Array:
        """Images (N, height, width, channels) of 8 bits as the model is given them, float32."""
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        ordered = pixels[..., ::-1] if self.channels == "bgr" else pixels
        images = ((ordered.astype(np.float32) / 255 - mean) / std).astype(np.float32)
        return images.transpose(0, 3, 1, 2) if self.layout == "nchw" else images


def load_data(
    source: str | Sequence[str], model: ir.Model, images: ImageOptions | None = None, ignored: int | None = None
) -> Dataset:
    """Reads data and checks it against a model's inputs and outputs.

    `source` is an .npz file, a folder with one sub-folder of images for each class, or `module:function` returning an
    iterable of dicts of arrays; or several of these, one behind the other. Inputs stay in files until they are used
    (those of compressed .npz files are in memory). Class labels of the value `ignored` don't count, and come out as -1.
    Raises `DataError` naming the array for wrong names, shapes, dtypes, counts or labels, no samples, and NaNs or
    infinities; `UsageError` for options of images where there are none.
    """
    sources = [source] if isinstance(source, str) else list(source)
    if not sources:
        raise DataError("no data: give an .npz, a folder of images or module:function")
    if images not in (None, ImageOptions()) and not any(Path(each).is_dir() for each in sources):
        raise UsageError(f"--mean, --std, --size and --layout are for folders of images; {', '.join(sources)} is none")
    found = [_arrays(each, model, images or ImageOptions()) for each in sources]
    for each, arrays in zip(sources, found, strict=True):
        if single := [name for name, array in arrays.items() if not array.ndim]:
            raise DataError(f"{each}: array {single[0]!r} is a single number; give a row for each sample")
    for each, arrays in zip(sources[1:], found[1:], strict=True):
        if fault := _misfit(found[0], arrays):
            raise DataError(f"{each}: {fault} as in {sources[0]}; give the same arrays in each")
    joined = {name: cast(Array, StoredArray([arrays[name] for arrays in found])) for name in found[0]}
    arrays = {name: np.asarray(array) if name.split(".")[0] == "labels" else array for name, array in joined.items()}
    return check_data(arrays, model, ", ".join(sources), ignored)


def _misfit(first: Mapping[str, Array], other: Mapping[str, Array]) -> str | None:
    """What is different about the arrays of another source."""
    if set(first) != set(other):
        return f"it has arrays {sorted(other)}, not {sorted(first)}"
    for name, array in first.items():
        if (array.dtype, array.shape[1:]) != (other[name].dtype, other[name].shape[1:]):
            return f"array {name!r} is {other[name].dtype} {other[name].shape[1:]}, not {array.dtype} {array.shape[1:]}"
    return None


def _arrays(source: str, model: ir.Model, images: ImageOptions) -> dict[str, Array]:
    path = Path(source)
    if path.is_dir():
        return _from_folder(path, model, images)
    if path.is_file() or source.endswith((".npz", ".npy")):
        return _from_npz(path)
    if ":" in source:
        return _from_function(source)
    raise DataError(f"{source}: no such file or folder; give an .npz, a folder of images or module:function")


def _from_npz(path: Path) -> dict[str, Array]:
    """Arrays that are stored as they are stay in the file; compressed ones are read."""
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise DataError(f"{path}: holds a single array; save arrays by name with numpy.savez")
        with file, zipfile.ZipFile(path) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            stored = {name for name in file.files if entries[name].compress_type == zipfile.ZIP_STORED}
            for name in stored:
                _check_sum(archive, entries[name])
            return {name: _mapped(path, entries[name]) if name in stored else file[name] for name in file.files}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        why = "it holds something else" if "pickle" in str(error) else str(error).splitlines()[0]
        raise DataError(f"{path}: not an .npz file that can be read: {why}") from error


def _check_sum(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Reads an entry once, as mapping doesn't notice damage. Raises `BadZipFile` where its check sum is another."""
    with archive.open(entry) as file:
        while file.read(PIECE):
            pass


def _mapped(path: Path, entry: zipfile.ZipInfo) -> Array:
    """An array in an archive, which is read where it lies."""
    with path.open("rb") as file:
        file.seek(entry.header_offset + NAME_SIZES)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # the lengths of the name and of extra fields
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"array {entry.filename} holds Python objects")
        if 0 in shape or not shape:
            return np.fromfile(file, dtype, int(np.prod(shape))).reshape(shape)
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


class Spool:
    """Rows that are written to a temporary file, batch after batch, and read from there."""

    def __init__(self) -> None:
        self.file, self.count = tempfile.TemporaryFile(), 0  # noqa: SIM115 (it closes with the spool)
        self.shape, self.dtype = tuple[int, ...](), np.dtype(np.float32)

    def add(self, rows: Array) -> None:
        """Raises `ValueError` for rows that aren't like the first."""
        if not self.count:
            self.shape, self.dtype = rows.shape[1:], rows.dtype
        elif (rows.shape[1:], rows.dtype) != (self.shape, self.dtype):
            raise ValueError(f"rows of {rows.dtype} {rows.shape[1:]} after rows of {self.dtype} {self.shape}")
        self.file.write(np.ascontiguousarray(rows).data)
        self.count += len(rows)

    def array(self) -> Array:
        """All rows so far."""
        self.file.flush()
        shape = (self.count, *self.shape)
        return np.memmap(self.file, self.dtype, "r", shape=shape) if np.prod(shape) else np.empty(shape, self.dtype)


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
    spools = defaultdict[str, Spool](Spool)
    try:
        for batch in load_function(source)():
            for name in spools or batch:
                spools[name].add(np.asarray(batch[name]))
        return {name: spool.array() for name, spool in spools.items()}
    except DataError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise DataError(f"{source}: {type(error).__name__}: {error}; it must return dicts of batched arrays") from error


@dataclass(frozen=True)
class ImageFolder:
    """The images of a folder, in order, and the names of the sub-folders they lie in; None for each without classes."""

    path: Path
    files: tuple[Path, ...]
    classes: tuple[str, ...] | None
    size: tuple[int, int]
    mode: Literal["L", "RGB"]
    input: str

    @staticmethod
    def of(path: Path, model: ir.Model, options: ImageOptions) -> ImageFolder:
        """Looks through a folder. Sub-folders are classes, where there are two or more with images in them.

        Hidden files and folders don't count. Raises `DataError` where there are no images, or their size can't be told.
        """
        value = model_inputs(model)[0]
        folders = [entry for entry in sorted(path.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
        found = {folder.name: files for folder in folders if (files := _images_in(folder))}
        flat = _images_in(path)
        if len(found) < 2 or flat:
            files = [*flat, *(file for each in found.values() for file in each)]
            classes = None
            if flat and len(found) > 1:
                raise DataError(
                    f"{path}: holds images beside sub-folders of images; are they classes or not? Part them"
                )
        else:
            files = [file for each in found.values() for file in each]
            classes = tuple(name for name, each in found.items() for _ in each)
        if not files:
            raise DataError(f"{path}: no images ({', '.join(sorted(IMAGE_SUFFIXES))}), here or in sub-folders")
        shape = list(value.shape or ())
        first, second, channels = (2, 3, 1) if options.layout == "nchw" else (1, 2, 3)
        size = options.size
        if size is None and len(shape) == 4 and isinstance(shape[first], int) and isinstance(shape[second], int):
            size = (int(str(shape[first])), int(str(shape[second])))
        if size is None or len(shape) != 4:
            raise DataError(
                f"{path}: the image size can't be read off input {value.name!r} of shape {list(map(str, shape))}; give "
                "--size HEIGHT WIDTH, or --layout nhwc where channels come last"
            )
        mode: Literal["L", "RGB"] = "L" if shape[channels] == 1 else "RGB"
        for name in ("mean", "std"):
            if len(getattr(options, name)) not in (1, len(mode)):
                raise UsageError(f"--{name}: give one number, or one for each channel of the images, which are {mode}")
        return ImageFolder(path, tuple(files), classes, size, mode, value.name or "")

    def said(self, options: ImageOptions) -> str:
        """What is done to the images, and which classes they have, in words."""
        height, width = self.size
        fitted = f"squeezed to {height} x {width}"
        if options.crop is not None:
            fitted = f"scaled and the middle of {height} x {width} cut out (crop {options.crop:g})"
        mean, std = (", ".join(f"{each:g}" for each in values) for values in (options.mean, options.std))
        order = options.channels.upper() if self.mode == "RGB" else "grey"
        names = sorted(set(self.classes or ()))
        told = f"{len(names)} classes, {names[0]} to {names[-1]} by {options.label_order}" if names else "no classes"
        return (
            f"{self.path}: {len(self.files)} images, {fitted}, (pixels / 255 - ({mean})) / ({std}), {order}, "
            f"{options.layout}; {told}"
        )

    def pixels(self, file: Path, crop: float | None) -> Array:
        """One image, (1, height, width, channels), of 8 bits. Raises `DataError` for what can't be read."""
        try:
            image = Image.open(file).convert(self.mode)
            return np.asarray(_resized(image, self.size, crop), np.uint8).reshape(1, *self.size, -1)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise DataError(f"{file}: not an image that can be read: {error}") from error

    def labels(self, options: ImageOptions) -> Array | None:
        """The class of each image; None without classes. Raises `UsageError` for names that are no numbers."""
        if self.classes is None:
            return None
        if options.label_order == "numbers":
            if wrong := [name for name in self.classes if not name.isdecimal()]:
                raise UsageError(f"--label-order numbers: {self.path / wrong[0]} is not named by a number")
            return np.array([int(name) for name in self.classes], np.int64) + options.label_offset
        order = {name: index for index, name in enumerate(sorted(set(self.classes)))}
        return np.array([order[name] for name in self.classes], np.int64) + options.label_offset


def _images_in(folder: Path) -> list[Path]:
    visible = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    return [file for file in visible if file.suffix.lower() in IMAGE_SUFFIXES]


def _resized(image: Image.Image, size: tuple[int, int], crop: float | None) -> Image.Image:
    """An image squeezed to (height, width); or scaled, and its middle cut out."""
    height, width = size
    if crop is None:
        return image.resize((width, height), Image.Resampling.BILINEAR)
    scale = max(round(height / crop) / image.height, round(width / crop) / image.width)
    scaled = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))), Image.Resampling.BILINEAR
    )
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    return scaled.crop((left, top, left + width, top + height))


def _from_folder(path: Path, model: ir.Model, options: ImageOptions) -> dict[str, Array]:
    folder = ImageFolder.of(path, model, options)
    spool = Spool()
    for file in folder.files:
        spool.add(options.prepared(folder.pixels(file, options.crop)))
    labels = folder.labels(options)
    return {folder.input: spool.array(), **({} if labels is None else {"labels": labels})}


def as_dataset(
    source: str | Sequence[str] | Mapping[str, Array],
    model: ir.Model,
    images: ImageOptions | None,
    ignored: int | None = None,
) -> Dataset:
    """A `Dataset` from what a caller of the Python API may give: sources as for `load_data`, or a dict of arrays."""
    if isinstance(source, Mapping):
        arrays = {name: array if hasattr(array, "dtype") else np.asarray(array) for name, array in source.items()}
        return check_data(arrays, model, ignored=ignored)
    if isinstance(source, str | os.PathLike):
        return load_data(str(source), model, images, ignored)
    if isinstance(source, Sequence) and all(isinstance(each, str | os.PathLike) for each in source):
        return load_data([str(each) for each in source], model, images, ignored)
    raise DataError(f"data must be paths, module:function or a dict of arrays, not {type(source).__name__}")
