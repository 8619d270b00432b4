#!/usr/bin/env python3
"""check_ties.py FOLDER [--out FILE]: does anything that costs next to nothing tie layers to each other?

An oracle for `normalising/untie.py` that shares no code with it. In each normalised model of a folder, every reader of
a value that hangs on no weights of a product gets the whole computation of that value for itself. Groups are counted
again: a model that has more then holds a tie that needn't be. A folder with a `zoo.py` holds topologies without
weights, which it fills by a seed. Writes a row for each model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxprune import OnnxPruneError
from onnxprune.graph.model import open_model, weight_bytes
from onnxprune.labels import analyse
from onnxprune.labels.units import Units, find_units
from onnxprune.normalising.normalise import normalise

HEAVY = {"Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Attention", "Einsum", "MatMulInteger"}
LARGEST = 2**16


def owned(model: ir.Model) -> int:
    """Gives every reader of what is cheap a computation of its own, in place; returns how many it gave."""
    cheap = dict[ir.Value, bool]()
    for value in model.graph.initializers.values():
        cheap[value] = value.const_value is not None and value.const_value.size <= LARGEST
    fed = set(model.graph.inputs)
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        holds = any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())
        looks_up = node.op_type in ("Gather", "GatherND") and any(value in fed for value in inputs)
        light = not holds and not looks_up and node.op_type not in HEAVY and not node.domain
        light = light and all(cheap.get(value, value.is_graph_input()) for value in inputs)
        cheap.update(dict.fromkeys(node.outputs, light))
        if light and any(value in fed for value in inputs) and node.op_type != "Shape":
            fed.update(node.outputs)
    given, seen = 0, set[ir.Value]()

    def reach(value: ir.Value) -> set[ir.Value]:
        node = value.producer()
        if node is None:
            return {value}
        return {value}.union(*[reach(each) for each in node.inputs if each is not None and cheap.get(each)])

    def copy(value: ir.Value, user: ir.Node, copies: dict[ir.Value, ir.Value]) -> ir.Value:
        node: ir.Node | None = value.producer()
        if value in copies or not cheap.get(value):
            return copies.get(value, value)
        if node is None:
            name = f"{value.name}~{given}"
            made = ir.Value(name=name, type=value.type, shape=value.shape, const_value=value.const_value)
            model.graph.register_initializer(made)
            copies[value] = made
            return made
        fed_by = [None if each is None else copy(each, user, copies) for each in node.inputs]
        twin = ir.Node("", node.op_type, fed_by, node.attributes.values(), num_outputs=len(node.outputs))
        twin.name = f"{node.name}~{given}"
        for old, new in zip(node.outputs, twin.outputs, strict=True):
            new.name, new.type, new.shape = f"{old.name}~{given}", old.type, old.shape
            copies[old] = new
        model.graph.insert_before(user, twin)
        return copies[value]

    for node in list(model.graph):
        if node.outputs and cheap.get(node.outputs[0]):
            continue
        for index, read in enumerate(node.inputs):
            if read is None or not cheap.get(read) or read.producer() is None:
                continue
            if read.dtype not in (None, ir.DataType.FLOAT, ir.DataType.FLOAT16):
                continue
            if (whole := reach(read)) & seen:
                given += 1
                node.replace_input_with(index, copy(read, node, {}))
            seen |= whole
    return given


def groups(units: Units) -> int:
    """Groups with something to choose from."""
    return sum(len(group.units) > 1 for group in units.groups)


def look_at(model: ir.Model) -> dict[str, Any]:
    """Groups before and after."""
    normal = normalise(model)
    before, size = groups(find_units(analyse(normal))), weight_bytes(normal)
    given = owned(normal)
    return {"groups": before, "copies": given, "after": groups(find_units(analyse(normal))) if given else before} | {
        "bytes": size
    }


def models_in(folder: Path) -> Any:
    """The models of a folder, one after the other, filled where the folder says how."""
    filler = None
    if (folder / "zoo.py").exists():
        sys.path.insert(0, str(folder))
        filler = importlib.import_module("zoo")
    for path in sorted(folder.rglob("*.onnx")):
        if filler is None:
            yield path, open_model(path)
        else:
            yield path, ir.from_proto(filler.load(str(path), seed=0))


def main() -> None:
    """Looks at every model; ends with 1 where one has more groups than before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("ties.json"))
    options = parser.parse_args()
    rows = []
    for path, model in models_in(options.folder):
        try:
            row = {"model": path.name, **look_at(model)}
        except OnnxPruneError as error:
            row = {"model": path.name, "refused": str(error)}
        rows.append(row)
        options.out.write_text(json.dumps(rows, indent=1))
        if row.get("after", 0) > row.get("groups", 0):
            print(f"{row['model']}: {row['groups']} groups, {row['after']} when readers get copies", flush=True)
    tied = sum(row.get("after", 0) > row.get("groups", 0) for row in rows)
    print(f"{len(rows)} models, {tied} with a tie that needn't be, {sum('refused' in row for row in rows)} refused")
    sys.exit(tied > 0)


if __name__ == "__main__":
    main()
