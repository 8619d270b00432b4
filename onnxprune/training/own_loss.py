"""A loss of the user's own: an ONNX graph that reads the model's outputs, labels and the uncut model's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import version_converter
from onnx_ir.passes import common

from onnxprune.errors import DataError, ModelError, TrainingError, UsageError
from onnxprune.evaluating.data import Dataset
from onnxprune.evaluating.sources import load_function
from onnxprune.graph.model import open_model
from onnxprune.training.lowering import spell_out


@dataclass(frozen=True)
class OwnLoss:
    """A graph whose first output is the loss, and what its inputs are given, by their names.

    `outputs` are the model's, `teachers` say which of the uncut model's, `labels` which labels ("" are those of the
    first output), in which type.
    """

    model: ir.Model
    outputs: tuple[str, ...]
    teachers: dict[str, str]
    labels: dict[str, tuple[str, ir.DataType]]


def load_own_loss(source: str, model: ir.Model, data: Dataset) -> OwnLoss:
    """The loss in an ONNX file, or that `module:function` returns as an `onnx.ModelProto` or an onnxscript function.

    Its first output is a float32 scalar, to be minimised, a mean over samples. Its inputs say by their names what they
    are given: an output of the model, `teacher.OUTPUT` for the uncut model's, `labels`, or `labels.NAME` for the array
    of that name in the data; `_` will do for the dot. Raises `UsageError` for a graph that isn't like that.
    """
    graph = _read(source)
    outputs = [value.name or "" for value in model.graph.outputs]
    if not graph.graph.outputs or graph.graph.outputs[0].dtype != ir.DataType.FLOAT:
        raise UsageError(f"--loss {source}: its first output must be the loss, a float32 scalar")
    keys = [name for name in ("", *data.others) if data.labels_of(name) is not None]
    known_labels = {f"labels{dot}{key}" if key else "labels": key for dot in "._" for key in keys}
    known_teachers = {f"teacher{dot}{output}": output for dot in "._" for output in outputs}
    read, taught, labels = list[str](), dict[str, str](), dict[str, tuple[str, ir.DataType]]()
    for value in graph.graph.inputs:
        name = value.name or ""
        if name in graph.graph.initializers:
            continue
        if name in outputs:
            read.append(name)
        elif name in known_labels:
            labels[name] = (known_labels[name], value.dtype or ir.DataType.FLOAT)
        elif name in known_teachers:
            taught[name] = known_teachers[name]
        else:
            known = ", ".join([*outputs, *known_labels, *known_teachers])
            raise UsageError(f"--loss {source} reads {name!r}; its inputs can be: {known}")
    return OwnLoss(graph, tuple(read), taught, labels)


def _read(source: str) -> ir.Model:
    """Raises `UsageError` when there is no graph."""
    try:
        if Path(source).is_file() or source.endswith(".onnx"):
            graph = open_model(source)
        else:
            graph = ir.from_proto(_built(source))
    except (ModelError, DataError, TypeError, ValueError) as error:
        raise UsageError(f"--loss {source}: {error}") from error
    common.InlinePass()(graph)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(graph)
    return graph


def _built(source: str) -> onnx.ModelProto:
    if ":" not in source:
        raise UsageError(
            f"--loss {source}: no such loss; give cross-entropy, bce, mse, l1, OUTPUT=KIND:WEIGHT, a file.onnx or "
            "module:function"
        )
    function: Any = load_function(source)
    try:
        built = function if hasattr(function, "to_model_proto") else function()
        built = built.to_model_proto() if hasattr(built, "to_model_proto") else built
    except Exception as error:  # the user's code may raise anything
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not isinstance(built, onnx.ModelProto):
        raise TypeError(f"it returned {type(built).__name__}, not an onnx.ModelProto or an onnxscript function")
    return built


def graft(model: ir.Model, own: OwnLoss, given: Callable[[str], ir.Value], prefix: str) -> ir.Value:
    """Puts the loss behind a model, reading for each of its inputs what `given` returns for that name; its value."""
    graph = spell_out(_in_opset(own.model, model.opset_imports.get("", 0)))
    renamed: Mapping[ir.Value, ir.Value] = {
        value: given(value.name or "") for value in graph.graph.inputs if value.name not in graph.graph.initializers
    }
    for value, replacement in renamed.items():
        value.replace_all_uses_with(replacement, replace_graph_outputs=True)
    for initializer in list(graph.graph.initializers.values()):
        del graph.graph.initializers[initializer.name or ""]
        initializer.name = f"{prefix}.{initializer.name}"
        model.graph.register_initializer(initializer)
    loss, nodes = graph.graph.outputs[0], list(graph.graph)
    graph.graph.outputs.clear()
    graph.graph.remove(nodes)
    for node in nodes:
        node.name = f"{prefix}.{node.name}"
        for value in node.outputs:
            value.name = f"{prefix}.{value.name}"
    model.graph.extend(nodes)
    return loss


def _in_opset(model: ir.Model, version: int) -> ir.Model:
    """A copy in this opset. Raises `TrainingError` where there is no way."""
    if model.opset_imports.get("", version) == version:
        return model.clone()
    try:
        return ir.from_proto(version_converter.convert_version(ir.to_proto(model), version))
    except Exception as error:  # the converter raises plain RuntimeErrors of many kinds
        raise TrainingError(
            f"the loss has opset {model.opset_imports.get('')}, the model {version}, and can't be converted: "
            f"{str(error).splitlines()[0]}; build it with opset {version}"
        ) from error
