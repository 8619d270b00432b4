"""Opening and saving models: the one place where files become graphs and graphs become files."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import checker
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnxruntime import InferenceSession, SessionOptions

from onnxprune.errors import ModelError
from onnxprune.files import replacing

PROTOBUF_LIMIT = 2**31 - 2**20  # bytes; a larger message can't be serialised
EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}


def open_model(path: str | os.PathLike[str]) -> ir.Model:
    """Reads an ONNX file after checking that it is safe and sound to read.

    The file itself is never written to. Every external tensor must be a regular file inside the model's folder, and
    hold as many bytes as its shape needs.

    Raises:
        ModelError: the file is missing, is not ONNX, is truncated, is invalid, has sparse initializers, or has
            external data that is missing or outside its folder.
    """
    file = Path(path)
    if not file.exists():
        raise ModelError(f"{file}: no such file; give the path of an .onnx file")
    file = file.resolve()
    if not file.is_file():
        raise ModelError(f"{file}: not a file; give the path of an .onnx file")
    proto = _parse(file)
    _check_external_data(proto, file)
    try:
        checker.check_model(str(file))
    except (checker.ValidationError, RuntimeError) as error:
        raise ModelError(f"{file}: not a valid ONNX model: {_first_line(error)}; export it again") from error
    if proto.graph.sparse_initializer:
        names = [tensor.values.name for tensor in proto.graph.sparse_initializer]
        raise ModelError(f"{file}: initializer {names[0]!r} is sparse, which can't be pruned; export it as dense")
    try:
        return ir.load(str(file))
    except Exception as error:
        raise ModelError(f"{file}: can't be read as a graph: {_first_line(error)}") from error


def _parse(file: Path) -> onnx.ModelProto:
    try:
        proto = onnx.load(str(file), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{file}: not an ONNX model, or truncated ({_first_line(error)})") from error
    except OSError as error:
        raise ModelError(f"{file}: can't be read: {error.strerror}") from error
    if not proto.ir_version or not proto.graph.node:
        raise ModelError(f"{file}: not an ONNX model: it has no graph")
    return proto


def _check_external_data(proto: onnx.ModelProto, file: Path) -> None:
    for tensor in _all_tensors(proto):
        if not uses_external_data(tensor):
            continue
        where = f"{file}: initializer {tensor.name!r}"
        unknown = {entry.key for entry in tensor.external_data} - EXTERNAL_KEYS
        if unknown:
            raise ModelError(f"{where} has external data with unknown keys {sorted(unknown)}; export it again")
        info = ExternalDataInfo(tensor)
        data = (file.parent / info.location).resolve()
        if not data.is_relative_to(file.parent):
            raise ModelError(f"{where} keeps its data outside the model's folder ({info.location}); refused")
        if not data.is_file():
            raise ModelError(f"{where} keeps its data in {data}, which is missing; put it beside the model")
        size = _tensor_bytes(tensor)
        if (info.offset or 0) + (info.length or size) > data.stat().st_size or (info.length or size) != size:
            raise ModelError(f"{where}: {data} holds fewer or more bytes than its shape needs; copy the file again")


def external_files(path: Path) -> set[Path]:
    """The files beside a model that hold its external tensors."""
    proto = onnx.load(str(path), load_external_data=False)
    names = {ExternalDataInfo(t).location for t in _all_tensors(proto) if uses_external_data(t)}
    return {path.resolve().parent / name for name in names}


def _all_tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every tensor of a model: initializers and attributes, in subgraphs and local functions too."""
    found: list[onnx.TensorProto] = []
    graphs: list[Any] = [proto.graph, *proto.functions]
    while graphs:
        graph = graphs.pop()
        found += getattr(graph, "initializer", [])
        for node in graph.node:
            for attribute in node.attribute:
                found += [attribute.t, *attribute.tensors]
                graphs += [attribute.g, *attribute.graphs]
    return found


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    bits = int(ir.DataType(tensor.data_type).bitwidth)
    return int(math.prod(tensor.dims) * bits + 7) // 8


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def to_bytes(model: ir.Model) -> bytes:
    """The serialised model, weights included. Raises `ModelError` above protobuf's 2 GiB."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if size > PROTOBUF_LIMIT:
        raise ModelError(f"the model's weights take {size / 2**30:.1f} GiB; over 2 GiB is not supported yet")
    return bytes(ir.to_proto(model).SerializeToString())


def save_model(model: ir.Model, path: Path) -> None:
    """Writes a model to `path`, whole or not at all. Raises `UsageError` when it can't be written."""
    content = to_bytes(model)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def copy_model(model: ir.Model) -> ir.Model:
    """A copy whose graph can be changed on its own; the tensors themselves are shared."""
    return model.clone()


def open_session(
    model: ir.Model | bytes | str, options: SessionOptions | None = None, providers: list[Any] | None = None
) -> InferenceSession:
    """An onnxruntime session for a model. Raises `ModelError` with onnxruntime's reason when it refuses the model."""
    if options is None:
        options = SessionOptions()
    options.log_severity_level = 4
    source = to_bytes(model) if isinstance(model, ir.Model) else model
    try:
        return InferenceSession(source, options, providers=providers or ["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated types here
        raise ModelError(f"onnxruntime can't run the model: {_first_line(error)}") from error


def parameter_count(model: ir.Model) -> int:
    """How many floating-point numbers the initializers hold, constants of a single number left out."""
    return sum(
        tensor.size
        for value in model.graph.initializers.values()
        if (tensor := value.const_value) is not None and tensor.dtype.is_floating_point() and len(tensor.shape)
    )


def constant(value: ir.Value | None) -> Any:
    """The NumPy array of an initializer, or None for a value that is computed or absent."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()
