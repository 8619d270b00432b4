"""Small graphs written as ONNX text: every graph input but the named ones becomes a random initializer."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper, parser

from onnxprune.cutting.cut import cut
from onnxprune.cutting.verify import mask_oracle
from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import comparable_form, relative_difference, run_on_all, tolerance
from onnxprune.labels import analyse
from onnxprune.labels.units import Units, find_units
from onnxprune.normalising.normalise import normalise
from onnxprune.scoring.lineup import reorder, sort_rows


def proto(text: str, inputs: tuple[str, ...] = ("x",), opset: int = 21, seed: int = 0) -> onnx.ModelProto:
    """A checked model of the graph in `text`, which starts at its parameter list."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    model = parser.parse_model(f"{header}graph {text}")
    rng = np.random.default_rng(seed)
    for value in list(model.graph.input):
        if value.name in inputs:
            continue
        tensor = value.type.tensor_type
        shape = [dim.dim_value for dim in tensor.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        scale = 1 if tensor.elem_type == onnx.TensorProto.FLOAT else 20
        array = (scale * rng.standard_normal(shape)).astype(dtype)
        if "var" in value.name or value.name == "ws":
            array = np.abs(array) + 0.5
        model.graph.initializer.append(numpy_helper.from_array(array, value.name))
        model.graph.input.remove(value)
    onnx.checker.check_model(model)
    return model


def graph(text: str, inputs: tuple[str, ...] = ("x",), opset: int = 21) -> ir.Model:
    """The same, normalised."""
    return normalise(ir.from_proto(proto(text, inputs, opset)))


def random_cut(units: Units, rng: np.random.Generator, share: float = 0.5) -> np.ndarray:
    """Random survivors, at least one in every group."""
    alive = np.ones(units.count, bool)
    for group in units.groups:
        gone = min(len(group.units) - 1, round(share * len(group.units)))
        alive[rng.choice(group.units, gone, replace=False)] = False
    return alive


def shuffled(model: ir.Model, granularity: str = "auto") -> ir.Model:
    """The model with the columns of every row in another order, wherever that can be: it must compute the same."""
    other = model.clone()
    reorder(other, sort_rows(find_units(analyse(model, granularity)), "random"))  # type: ignore[arg-type]
    inputs = [random_inputs(model, 0, batch=None)]
    before, after = (run_on_all(comparable_form(each), inputs) for each in (model, other))
    assert all(relative_difference(a, b) <= tolerance(model) for a, b in zip(before, after, strict=True))
    return other


def check_oracle(model: ir.Model, seeds: int = 3, granularity: str = "auto", tolerance: float = 2e-5) -> Units:
    """Prunes at random several times; every exact cut must equal the masked model, every cut must run.

    Before that, the columns of every row are shuffled where they can be: that must change nothing.
    """
    model = shuffled(model, granularity)
    units = find_units(analyse(model, granularity))  # type: ignore[arg-type]
    for seed in range(seeds):
        alive = random_cut(units, np.random.default_rng(seed), (0.3, 0.5, 0.7)[seed % 3])
        pruned, plan = cut(units, alive)
        result = mask_oracle(model, pruned, plan, seeds=(seed, seed + 100))
        assert np.isfinite(result.difference)
        if result.comparable:
            assert result.difference <= tolerance, f"differs by {result.difference:.1e}"
    return units
