"""What is cheap to compute ties nothing: every reader of a state, a mask or a position bias gets one of its own.

Exporters compute such a tensor once for all layers. Read by all, its axes would tie their heads or hidden units, though
none needs what the others keep. So the nodes that compute it are copied for each reader; copies that end up equal are
joined again when the model is handed over. And what is picked from a Concat is read from the part that
it comes from, so that the other parts aren't tied to it.
"""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from onnxprune.evaluating.evaluate import all_shapes
from onnxprune.graph.model import constant, weight_bytes
from onnxprune.graph.shapes import add_initializer, infer_shapes
from onnxprune.labels import Solution, analyse
from onnxprune.labels.flow import integer, operator_name
from onnxprune.labels.pointwise import BROADCAST, UNARY

CHEAP = {
    *UNARY.split(), *BROADCAST.split(), "Concat", "ConstantOfShape", "CumSum", "Expand", "EyeLike", "Flatten", "Gather",
    "OneHot", "Pad", "Range", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Reshape", "Shape", "Size", "Slice",
    "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze",
}  # fmt: skip
ELEMENTWISE = set(BROADCAST.split())
LARGEST = 2**16  # numbers in an initializer that is copied with what is computed from it
MOST = 0.1  # of the bytes of all weights that the copies may hold

Positions = NDArray[np.int64]
Edge = tuple[ir.Node, int]  # a reader and the place among its inputs


def untie(model: ir.Model) -> None:
    """Gives every reader of a cheap value that ties it to others a copy, in a normalised model, in place."""
    cheap = _cheap_nodes(model)
    shared = _shared_edges(model, cheap)
    if not shared:
        return
    shapes = all_shapes(model)
    before = analyse(model, shapes=shapes)
    shared = [edge for edge in shared if any(vector is not None for vector in before.axes(_read(edge)))]
    if not shared:
        return
    originals = {edge: _read(edge) for edge in shared}
    for _, edges in itertools.groupby(shared, key=lambda edge: edge[0]):
        _copy_for(model, list(edges), cheap)
    after = analyse(model)
    held = [edge for edge in shared if not _is_apart(after, _read(edge), originals[edge])]
    for node, index in held:
        node.replace_input_with(index, originals[node, index])
    common.RemoveUnusedNodesPass()(model)


def _read(edge: Edge) -> ir.Value:
    value = edge[0].inputs[edge[1]]
    assert value is not None
    return value


def _cheap_nodes(model: ir.Model) -> set[ir.Node]:
    """The nodes that compute, cheaply, what hangs on sizes, small constants and inputs alone.

    Where inputs take part, tables don't: what is looked up in one is an embedding, with weights of its own.
    """
    found, fed = set[ir.Node](), set[ir.Value](model.graph.inputs)
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        made = [value for value in inputs if not value.is_initializer() and value.producer() not in found]
        if operator_name(node) not in CHEAP or not all(value in fed or value.is_graph_input() for value in made):
            continue
        sized = [value.const_value.shape.numpy() for value in inputs if value.const_value is not None]
        reads = any(value in fed for value in inputs) and node.op_type not in ("Shape", "Size")
        if any(np.prod(size) > LARGEST or (reads and sum(dim > 1 for dim in size) > 1) for size in sized):
            continue
        found.add(node)
        if reads:
            fed.update(node.outputs)
    return found


def _shared_edges(model: ir.Model, cheap: set[ir.Node]) -> list[Edge]:
    """Where nodes that aren't cheap read floats whose computation others read as well; the first of each reads on."""
    edges: list[Edge] = []
    taken = dict[ir.Node | ir.Value, ir.Node]()  # the first reader of each node, and of each initializer
    spare = MOST * weight_bytes(model)
    for node in model.graph:
        if node in cheap or node.domain not in ("", "com.microsoft"):
            continue
        for index, value in enumerate(node.inputs):
            if value is None or value.is_graph_input():
                continue
            chain: set[ir.Node | ir.Value] = set(_chain(value, cheap))
            tensor = value.const_value if value.is_initializer() and operator_name(node) in ELEMENTWISE else None
            if tensor is not None and len(value.uses()) > 1 and tensor.nbytes < spare:
                chain = {value}
            if any(taken.get(each, node) is not node for each in chain):
                spare -= tensor.nbytes if tensor is not None else 0
                edges.append((node, index))
            else:
                taken.update(dict.fromkeys(chain, node))
    return edges


def _chain(value: ir.Value, cheap: set[ir.Node]) -> list[ir.Node]:
    """The cheap nodes that compute a value."""
    found, pending = dict[ir.Node, None](), [value.producer()]
    while pending:
        node = pending.pop()
        if node is not None and node in cheap and node not in found:
            found[node] = None
            pending += [each.producer() for each in node.inputs if each is not None]
    return list(found)


def _copy_for(model: ir.Model, edges: list[Edge], cheap: set[ir.Node]) -> None:
    """Copies all that is needed to compute what one reader reads in these places."""
    reader = edges[0][0]
    chain = {node for edge in edges for node in _chain(_read(edge), cheap)}
    copies = dict[ir.Value, ir.Value]()

    def copy_of(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in copies:
            return None if value is None else copies[value]
        array = constant(value)
        return value if array is None else add_initializer(model, f"{value.name}.of.{reader.name}", array)

    for node in [node for node in model.graph if node in chain]:
        inputs = [copy_of(value) for value in node.inputs]
        name, count = f"{node.name}.of.{reader.name}", len(node.outputs)
        twin = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=count, name=name)
        for old, new in zip(node.outputs, twin.outputs, strict=True):
            new.name, new.type, new.shape = f"{old.name}.of.{reader.name}", old.type, old.shape
            copies[old] = new
        model.graph.insert_before(reader, twin)
    for node, index in edges:
        node.replace_input_with(index, copy_of(_read((node, index))))


def _is_apart(solution: Solution, copy: ir.Value, original: ir.Value) -> bool:
    """Whether a copy has an axis that can be cut, and that isn't tied to the original's some other way."""
    for mine, other in zip(solution.axes(copy), solution.axes(original), strict=True):
        free = mine is not None and not solution.locked[mine].all()
        if mine is not None and free and (other is None or not np.isin(mine, other).any()):
            return True
    return False


def pick_from_parts(model: ir.Model) -> None:
    """Where positions are picked from a Concat by number, reads them from the parts that they lie in, in place."""
    pickers = [node for node in model.graph if node.op_type in ("Gather", "Slice") and not node.domain]
    if not any(node.inputs[0] is not None and _joins(node.inputs[0].producer()) for node in pickers):
        return
    shapes = infer_shapes(model)
    for node in pickers:
        join = node.inputs[0].producer() if node.inputs[0] is not None else None
        if join is None or not _joins(join):
            continue
        rank = len(shapes(join.outputs[0]) or ())
        axis = integer(join, "axis", 0) % rank if rank else 0
        sizes = [(shapes(value) or (None,) * (axis + 1))[axis] if value is not None else None for value in join.inputs]
        if not rank or any(size is None for size in sizes):
            continue
        edges = np.cumsum([0, *[size or 0 for size in sizes]])
        picked = _picked(node, axis, rank, int(edges[-1]))
        if picked is None or not picked.size:
            continue
        parts = [i for i in range(len(sizes)) if ((picked >= edges[i]) & (picked < edges[i + 1])).any()]
        if len(parts) < len(sizes) and parts == list(range(parts[0], parts[-1] + 1)):
            _read_parts(model, node, join, parts, edges)


def _joins(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Concat" and not node.domain


def _picked(node: ir.Node, axis: int, rank: int, size: int) -> Positions | None:
    """The positions of an axis that a node picks, from 0; None where they aren't known or lie along another axis."""
    if node.op_type == "Gather":
        indices = constant(node.inputs[1])
        along = integer(node, "axis", 0) % rank == axis
        return None if indices is None or not along else np.ravel(indices).astype(np.int64) % size
    bounds = [constant(value) for value in node.inputs[1:]]
    if len(bounds) < 3 or any(each is None or each.size != 1 for each in bounds) or bounds[2].item() % rank != axis:
        return None
    start, end, step = bounds[0].item(), bounds[1].item(), bounds[3].item() if len(bounds) > 3 else 1
    return np.arange(size)[start:end:step] if step > 0 else None


def _read_parts(model: ir.Model, node: ir.Node, join: ir.Node, parts: list[int], edges: Positions) -> None:
    """Lets a node read these parts of a Concat, which start at these `edges`, instead of all."""
    source, first, whole = join.inputs[parts[0]], int(edges[parts[0]]), int(edges[-1])
    if len(parts) > 1:
        part = ir.node("Concat", [join.inputs[i] for i in parts], join.attributes, name=f"{node.outputs[0].name}.parts")
        part.outputs[0].name = part.name
        model.graph.insert_before(node, part)
        source = part.outputs[0]
    node.replace_input_with(0, source)
    for index in (1, 2) if node.op_type == "Slice" else (1,):
        value = node.inputs[index]
        assert value is not None
        array = np.array(constant(value))
        moved = np.where(array < 0, array + whole, np.minimum(array, whole)) - first
        node.replace_input_with(
            index, add_initializer(model, f"{value.name}.in.{node.outputs[0].name}", moved.astype(array.dtype))
        )
