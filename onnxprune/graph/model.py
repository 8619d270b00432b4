"""Opening, saving and running models: the one place where files become graphs and graphs become files.

Weights never pass through protobuf: a skeleton of the model does, and the weights go beside it, where they are.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import checker
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx_ir import external_data
from onnxruntime import InferenceSession, OrtValue, SessionOptions

from onnxprune.errors import ModelError, UsageError
from onnxprune.graph.files import check_writable, replacing
from onnxprune.graph.threads import session_options

INLINE = 1.9 * 2**30  # bytes of weights; protobuf can't serialise a message of 2 GiB
SMALL = 1024  # bytes of an initializer that stays in a skeleton: sizes, axes, and what the opset converter reads
NATIVE = {  # types whose arrays onnxruntime takes as they are
    *(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE),
    *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL),
}
KEPT, SIZE_BEFORE = "kept", "size"  # in the meta data of a cut initializer: for each axis what is left, and of how many
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
    _check(file)
    if proto.graph.sparse_initializer:
        names = [tensor.values.name for tensor in proto.graph.sparse_initializer]
        raise ModelError(f"{file}: initializer {names[0]!r} is sparse, which can't be pruned; export it as dense")
    maps = [value.name for value in proto.graph.output if "map_type" in str(value.type)]
    if maps:
        raise ModelError(
            f"{file}: output {maps[0]!r} is a map, which isn't a tensor; export scikit-learn models with "
            "options={'zipmap': False}"
        )
    _free_sizes(proto.graph)
    try:
        model = ir.from_proto(proto)
        external_data.set_base_dir(model.graph, str(file.parent))
        _unpack(model)
        return model
    except Exception as error:
        raise ModelError(f"{file}: can't be read as a graph: {_first_line(error)}") from error


def _check(file: Path) -> None:
    try:
        checker.check_model(str(file))
    except (checker.ValidationError, RuntimeError) as error:
        if "No Op registered for" not in str(error):  # onnxruntime has operators of its own there; it will say
            raise ModelError(f"{file}: not a valid ONNX model: {_first_line(error)}; export it again") from error


def _free_sizes(graph: onnx.GraphProto) -> None:
    """Makes sizes of inputs and outputs that mean "any" dynamic: -1, and names that tell none apart, like "?"."""
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_value < 0 or (dim.dim_param and not any(letter.isalnum() for letter in dim.dim_param)):
                dim.Clear()


def _unpack(model: ir.Model) -> None:
    """Makes every initializer that should not stay where it is an array of its own.

    Large inline ones, since protobuf copies the bytes whenever it is asked for them, and small external ones and those
    inside subgraphs and attributes, which a session that is made from memory can't read.
    """
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor, main = value.const_value, graph is model.graph
            inline = isinstance(tensor, ir.TensorProtoTensor) and tensor.nbytes > SMALL and tensor.dtype in NATIVE
            small = isinstance(tensor, ir.ExternalTensor) and (tensor.nbytes <= SMALL or not main)
            if tensor is not None and (inline or small):
                value.const_value = _own(tensor)
        for node in graph:
            for attribute in list(node.attributes.values()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[attribute.name] = ir.AttrTensor(attribute.name, _own(attribute.value))


def _own(tensor: ir.TensorProtocol) -> ir.Tensor[Any]:
    return ir.Tensor(np.array(tensor.numpy()), dtype=tensor.dtype, name=tensor.name)


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


def files_of(model: str | os.PathLike[str]) -> set[Path]:
    """The file of a model and those of its external tensors, resolved."""
    path = Path(model)
    return {path.resolve(), *(external_files(path) if path.is_file() else ())}


def check_outputs(
    model: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str] | None],
    others: Sequence[str | os.PathLike[str]] = (),
) -> None:
    """Raises `UsageError` for an output that can't be written, that is a part of an input, or that is there twice."""
    taken = {*files_of(model), *(Path(each).resolve() for each in others)}
    for path in [Path(p) for p in paths if p is not None]:
        check_writable(path)
        files = {path.resolve(), path.with_name(f"{path.name}.data").resolve()}
        if taken & files:
            raise UsageError(f"the output {path} is the input, or another output; choose another")
        taken |= files


def external_files(path: Path) -> set[Path]:
    """The files beside a model that hold its external tensors."""
    proto = _parse(path)
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


@contextlib.contextmanager
def weights_aside(model: ir.Model) -> Iterator[dict[str, ir.TensorProtocol]]:
    """Takes the large initializers out of a model for a while, and gives them by name.

    What is serialised meanwhile is a skeleton that names their types and shapes only.
    """
    held = {
        value: value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes > SMALL and value.const_value.dtype in NATIVE
    }
    try:
        for value, tensor in held.items():
            value.const_value = ir.ExternalTensor(
                "aside",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir="/",
            )
        yield {value.name or "": tensor for value, tensor in held.items()}
    finally:
        for value, tensor in held.items():
            value.const_value = tensor


def give_back(model: ir.Model, weights: Mapping[str, ir.TensorProtocol]) -> ir.Model:
    """Puts weights that were aside into a model that was read from a skeleton."""
    for value in model.graph.initializers.values():
        name = value.name or ""
        if isinstance(value.const_value, ir.ExternalTensor) and name in weights:
            value.const_value = weights[name]
    return model


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)


def to_bytes(model: ir.Model) -> bytes:
    """The serialised model, weights included. Raises `ModelError` above protobuf's 2 GiB."""
    if (size := weight_bytes(model)) > INLINE:
        raise ModelError(f"the model's weights take {size / 2**30:.1f} GiB; this step takes up to 1.9 GiB")
    return bytes(ir.to_proto(model).SerializeToString())


def keeps_data_beside(model: ir.Model) -> bool:
    """Whether a model's weights are saved in a file beside it: no single file can hold them, or they came that way."""
    beside = (ir.ExternalTensor, ir.LazyTensor)
    return weight_bytes(model) > INLINE or any(
        isinstance(value.const_value, beside) for value in model.graph.initializers.values()
    )


def digest(model: ir.Model) -> str:
    """The SHA-256, in hex, of the file that `save_model` writes; of skeleton and weights where they stand beside it."""
    if not keeps_data_beside(model):
        return hashlib.sha256(to_bytes(model)).hexdigest()
    with weights_aside(model) as weights:
        total = hashlib.sha256(ir.to_proto(model).SerializeToString())
    for tensor in weights.values():
        total.update(np.ascontiguousarray(tensor.numpy()).data)
        release(tensor)
    return total.hexdigest()


def save_model(model: ir.Model, path: Path) -> None:
    """Writes a model to `path`, whole or not at all. Raises `UsageError` when it can't be written.

    Weights over 1.9 GiB, which no single file can hold, and those of a model that came with external data stand in
    `path`.data.
    """
    if keeps_data_beside(model):
        return _save_with_data(model, path)
    content = to_bytes(model)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _save_with_data(model: ir.Model, path: Path) -> None:
    data = path.with_name(f"{path.name}.data")
    with replacing(path) as temporary, replacing(data) as temporary_data:  # the data is put in place first
        held = {value: value.const_value for value in model.graph.initializers.values()}
        try:
            ir.save(model, temporary, external_data=temporary_data.name)
            proto = onnx.load(str(temporary), load_external_data=False)
        finally:
            for value, tensor in held.items():
                value.const_value = tensor
        for tensor_proto in _all_tensors(proto):
            for entry in tensor_proto.external_data:
                if entry.key == "location":
                    entry.value = data.name
        path.unlink(missing_ok=True)  # an old model must never stand beside new data
        temporary.write_bytes(proto.SerializeToString())


class Session(InferenceSession):
    """An onnxruntime session that keeps alive the arrays it reads its weights from."""

    def __init__(
        self, source: str | bytes, options: SessionOptions, providers: list[Any], weights: dict[str, OrtValue]
    ) -> None:
        self.weights = weights
        options.add_external_initializers(list(weights), list(weights.values()))
        super().__init__(source, options, providers=providers)


def open_session(
    model: ir.Model | str, options: SessionOptions | None = None, providers: list[Any] | None = None
) -> InferenceSession:
    """An onnxruntime session for a model, on the first of the execution providers as far as that one can.

    Raises `ModelError` with onnxruntime's reason when it refuses the model, and `UsageError` when the provider can't be
    loaded, where onnxruntime alone would run everything on the CPU.
    """
    options = options or session_options()
    options.log_severity_level = 4
    source: str | bytes
    if isinstance(model, str):
        source, weights = model, {}
    else:
        with weights_aside(model) as tensors:
            source = ir.to_proto(model).SerializeToString()
        initializers = model.graph.initializers  # onnxruntime drops those that nothing uses
        used = {name for name in tensors if initializers[name].uses() or initializers[name].is_graph_output()}
        weights = {name: _ort_value(tensors[name]) for name in used}
    try:
        session = Session(source, options, providers or ["CPUExecutionProvider"], weights)
    except Exception as error:  # onnxruntime raises a dozen unrelated types here
        raise ModelError(f"onnxruntime can't run the model: {_first_line(error)}") from error
    for asked in (providers or [])[:1]:
        name = asked if isinstance(asked, str) else asked[0]
        if name not in session.get_providers():
            raise UsageError(
                f"{name} is in this onnxruntime but can't be loaded here; what it says above names what is missing "
                "(a driver, a library); install that or choose another execution provider"
            )
    return session


@cache
def is_loadable(provider: str) -> bool:
    """Whether an execution provider of the installed onnxruntime, by its full name, finds what it needs here."""
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }'
    try:
        open_session(ir.from_proto(onnx.parser.parse_model(text)), providers=[provider])
    except (ModelError, UsageError):
        return False
    return True


def _ort_value(tensor: ir.TensorProtocol) -> OrtValue:
    array = np.ascontiguousarray(tensor.numpy())
    if tensor.dtype == ir.DataType.BFLOAT16:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(tensor.dtype))
    return OrtValue.ortvalue_from_numpy(array)


def release(tensor: ir.TensorProtocol | None) -> None:
    """Lets go of the pages of a file that hold a tensor; they are read again when it is asked for."""
    if isinstance(tensor, ir.ExternalTensor):
        with contextlib.suppress(BufferError):  # somebody still reads them
            tensor.release()


def constant(value: ir.Value | None) -> Any:
    """The NumPy array of an initializer, or None for a value that is computed or absent."""
    if value is None or value.const_value is None or not value.is_initializer():
        return None
    return value.const_value.numpy()
