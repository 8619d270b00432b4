"""Repair without training: what is left of every layer is fitted to what the uncut layer computed.

For each convolution and product, in order: with X its inputs in the cut model and E what its outputs lack against the
uncut model's, the change of its weights is the ridge regression `(X'X + lambda I)^-1 X'E`, with a column of ones for
the bias. Inputs are the cut model's own, with everything before repaired already, so that errors don't pile up
(He et al. 2017, Channel Pruning, section 3.1, equation 5; Luo et al. 2017, ThiNet, equation 7). Labels aren't needed.
Where samples are scarce, lambda is what does best on samples that are held out, and a layer that gains nothing there is
left as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.cutting.plan import Plan
from onnxprune.evaluating.data import Dataset, batches, fixed_batch
from onnxprune.evaluating.evaluate import Batch, run_session, session_options
from onnxprune.graph.model import constant, open_session
from onnxprune.labels.flow import integer, integers, text
from onnxprune.labels.units import weight_matrix

SAMPLES = 512  # calibration samples
SIZE, FEW = 32, 4  # samples in a batch; in one by which memory is told
ROWS = 16384  # positions that a layer is fitted on, at most
MEMORY = 2**31  # bytes, of which a half is for inner values, a quarter each for uncut outputs and for Gram matrices
TENSORS, COPIES = 3, 4  # inner values of the largest size at once; float64 arrays while a layer is solved for
NARROWEST = 16  # inputs at a time, below which a layer is left alone
SILENT = 1e-3
RIDGE = 1e-3  # lambda, in units of the mean diagonal of the Gram matrix
PLENTY = 8  # positions for each input, below which lambda is chosen on a quarter of them that is held out
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)

Array = NDArray[np.float64]
Sample = NDArray[np.float32]  # (positions, channels)
Target = tuple[tuple[int, ...], NDArray[np.int64], Sample]  # the shape of a value, some of its positions, and those


@dataclass(frozen=True)
class Fit:
    """A layer that can be fitted: its node and parameters, and where its outputs are compared with the uncut ones.

    That is at `end`: the sum that it is a branch of, if any, so that it makes up for what the others lack as well; else
    its own output. `scale` is what a change of its output is multiplied with on the way, by channel, and `kept` the
    channels of the uncut value that are left.
    """

    node: ir.Node
    weight: ir.Value
    bias: ir.Value | None
    end: ir.Value
    scale: Array
    kept: list[int] | None

    @property
    def groups(self) -> int:
        """In how many parts inputs and outputs lie that don't see each other."""
        return integer(self.node, "group", 1) if self.node.op_type == "Conv" else 1

    @property
    def sizes(self) -> tuple[int, int]:
        """How many outputs there are in a group, and how many inputs each has."""
        outputs, inputs = self._matrix(np.asarray(constant(self.weight))).shape
        return outputs // self.groups, inputs

    @property
    def axis(self) -> int:
        """The axis of the output along which its channels lie."""
        return 1 if self.node.op_type == "Conv" else -1

    def outputs(self, array: NDArray[np.floating], rows: NDArray[np.int64]) -> Sample:
        """Some positions of an output, one in each row."""
        flat = np.moveaxis(array, self.axis, -1)
        return np.asarray(flat.reshape(-1, flat.shape[-1])[rows], np.float32)

    def inputs(self, array: NDArray[np.floating], shape: tuple[int, ...], rows: NDArray[np.int64]) -> Sample:
        """What those positions are computed from; `shape` is that of the output."""
        if self.node.op_type == "Conv":
            return _patches(self.node, array, shape, rows)
        return np.asarray(array.reshape(-1, array.shape[-1])[rows], np.float32)

    def change(self, delta: Array, block: slice) -> None:
        """Adds a change of shape (groups, inputs in the block, outputs), with one more input for the bias."""
        width = delta.shape[1] - (self.bias is not None)
        array = np.array(constant(self.weight), np.float64)
        matrix = self._matrix(array)
        matrix[:, block] += delta[:, :width].swapaxes(1, 2).reshape(len(matrix), width)
        _set(self.weight, array)
        if self.bias is not None:
            _set(self.bias, np.array(constant(self.bias), np.float64) + delta[:, width].ravel())

    def _matrix(self, weights: NDArray[Any]) -> NDArray[Any]:
        """A view of the weights as (outputs, inputs of each)."""
        if self.node.op_type == "Conv":
            return weights.reshape(len(weights), -1)
        return weights if self.node.op_type == "Gemm" and integer(self.node, "transB", 0) else weights.T


def reconstruct(
    model: ir.Model,
    baseline: ir.Model,
    plan: Plan,
    data: Dataset,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    memory: int | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> int:
    """Fits every convolution and product of a cut model, in place; returns how many there were.

    `plan` says what the model lost of `baseline`, whose value names it has. Left alone are weights that several nodes
    share or that aren't floats. `memory` bounds, in bytes, what is held beside the models and the runtime's own: fewer
    samples and positions, and layers whose Gram matrix would be too large are fitted to a part of their inputs after
    the other; `note` is told of those.
    """
    memory = memory or MEMORY
    layers = list(_layers(model, baseline, plan))
    if not layers or len(data) < (fixed_batch(model) or 1):
        return 0
    feeds, wanted = _uncut_outputs(baseline, layers, data, threads, memory)
    walk = Walk(model, feeds[: len(wanted[0])], threads)
    if len(wanted[0]) < len(feeds):
        note(f"repair: {len(wanted[0])} of {len(feeds)} batches of calibration data fit into {memory >> 20} MB")
    parted = list[str]()
    for number, layer in enumerate(layers):
        progress(number + 1, len(layers))
        walk.reach(layer.node)
        blocks = list(_blocks(layer, memory // 4))
        parted += [layer.node.name or ""] * (len(blocks) != 1)
        for block in blocks:
            _fit(walk, layer, wanted[number], block)
    if parted:
        note(f"repair: {len(parted)} layers were fitted to parts of their inputs for want of memory, as {parted[0]}")
    return len(layers)


def _blocks(layer: Fit, memory: int) -> Iterator[slice]:
    """The inputs of a layer in as few parts as memory allows for Gram matrices; nothing where they'd be too narrow."""
    outputs, inputs = layer.sizes
    numbers = memory // (8 * COPIES * layer.groups)
    widest = int((math.sqrt(outputs**2 + 4 * numbers) - outputs) / 2)
    if widest >= min(NARROWEST, inputs):
        edges = np.linspace(0, inputs, -(-inputs // widest) + 1).astype(int)
        yield from (slice(int(a), int(b)) for a, b in itertools.pairwise(edges))


def _layers(model: ir.Model, baseline: ir.Model, plan: Plan) -> Iterator[Fit]:
    known = {value.name for node in baseline.graph for value in node.outputs}
    for node in model.graph:
        if node.domain or node.op_type not in ("Conv", "Gemm", "MatMul") or node.outputs[0].name not in known:
            continue
        source, weight = node.inputs[0], node.inputs[1]
        if source is None or source.is_initializer() or weight is None or not _fits(node, weight):
            continue
        end, scale = _end(node)
        if end.name not in known:
            end, scale = node.outputs[0], np.ones(1)
        removals = {removal.axis: removal for removal in plan.tensors.get(end.name or "", ())}
        axis = 1 if node.op_type == "Conv" else max(removals, default=0)
        kept = removals[axis].kept() if axis in removals else None
        yield Fit(node, weight, _own_bias(node), end, scale, kept)


def _end(node: ir.Node) -> tuple[ir.Value, Array]:
    """The sum that a layer's output is added to, through biases and batch normalisation, and what it is scaled by."""
    value = own = node.outputs[0]
    scale = np.ones(1)
    while len(value.uses()) == 1 and not value.is_graph_output():
        user = value.consumers()[0]
        fixed = [each for each in user.inputs if each is not None and each.is_initializer()]
        if user.op_type == "BatchNormalization" and len(fixed) == 4:
            gamma, _, _, variance = (weight_matrix(each) for each in fixed)
            epsilon = user.attributes["epsilon"].as_float() if "epsilon" in user.attributes else 1e-5
            scale = scale * gamma / np.sqrt(variance + epsilon)
        elif user.op_type == "Add" and not fixed:
            silent = np.abs(scale) < SILENT * np.abs(scale).max()  # a channel that hardly arrives can't mend anything
            return user.outputs[0], np.where(silent, np.inf, scale)
        elif user.op_type == "Add" and own is value:
            own = user.outputs[0]  # with its bias
        elif user.op_type != "Add":
            break
        value = user.outputs[0]
    return own, np.ones(1)


def _fits(node: ir.Node, weight: ir.Value) -> bool:
    array = weight.const_value
    if not weight.is_initializer() or array is None or len(weight.uses()) > 1 or not array.dtype.is_floating_point():
        return False
    shape = tuple(int(dim) for dim in array.shape.numpy())
    if node.op_type == "Conv":
        return text(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
    scaled = any(name in node.attributes and node.attributes[name].as_float() != 1 for name in ("alpha", "beta"))
    return len(shape) == 2 and not scaled and not integer(node, "transA", 0)


def _own_bias(node: ir.Node) -> ir.Value | None:
    """The bias of a layer, or one that is added to a product behind it, if nothing else uses it."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    users = node.outputs[0].consumers()
    if node.op_type == "MatMul" and len(users) == 1 and users[0].op_type == "Add":
        value = next((each for each in users[0].inputs if each is not None and each.is_initializer()), None)
    array = constant(value)
    return value if value is not None and array is not None and array.ndim == 1 and len(value.uses()) == 1 else None


def _uncut_outputs(
    baseline: ir.Model, layers: list[Fit], data: Dataset, threads: int | None, memory: int
) -> tuple[Sequence[Batch], list[list[Target]]]:
    """Calibration batches, and what the uncut model computes where each layer ends for as many as memory allows."""
    names = [layer.end.name or "" for layer in layers]
    graph = ir.convenience.extract(baseline.graph, baseline.graph.inputs, list(dict.fromkeys(names)))
    session = open_session(ir.Model(graph, ir_version=baseline.ir_version), session_options(threads))
    size = fixed_batch(baseline) or min(SIZE, len(data))
    if fixed_batch(baseline) is None and size > FEW:
        few = run_session(session, next(batches(data.take(slice(0, FEW)), FEW)))
        size = max(FEW, min(size, FEW * (memory // 2) // sum(array.nbytes for array in few)))
    feeds = list(batches(data.take(slice(0, min(SAMPLES, len(data)) // size * size)), size))
    random = np.random.default_rng(0)
    found: list[list[Target]] = [[] for _ in layers]
    for number, batch in enumerate(feeds):
        ends = dict(zip(dict.fromkeys(names), run_session(session, batch), strict=True))
        arrays = [ends[name] for name in names]
        if number >= max(1, memory // 2 // (TENSORS * max(array.nbytes for array in arrays))):
            break
        widths = sum(array.shape[layer.axis] for layer, array in zip(layers, arrays, strict=True))
        limit = max(1, min(ROWS, memory // 4 // (4 * widths)) // len(feeds))
        for layer, array, targets in zip(layers, arrays, found, strict=True):
            positions = array.size // array.shape[layer.axis]
            rows = np.sort(random.choice(positions, min(limit, positions), replace=False))
            rest = layer.outputs(array, rows)
            targets.append((array.shape, rows, rest if layer.kept is None else rest[:, layer.kept]))
    return feeds, found


class Walk:
    """A walk through a model with all calibration batches at once: what later nodes need is held for each batch.

    So fitting one layer after the other takes about as long as running the model twice, not once for each layer.
    """

    def __init__(self, model: ir.Model, feeds: Sequence[Batch], threads: int | None) -> None:
        self.model, self.threads = model, threads
        self.order = {node: index for index, node in enumerate(model.graph)}
        self.nodes = list(model.graph)
        self.at = 0
        self.held = [dict(feed) for feed in feeds]

    def reach(self, node: ir.Node) -> None:
        """Computes everything that `node` and those behind it need from the nodes before it."""
        target = self.order[node]
        before = self.nodes[self.at : target]
        fresh = [value.name or "" for each in before for value in each.outputs if self._needed(value, target)]
        if fresh:
            for held, arrays in zip(self.held, self.run(fresh), strict=True):
                held.update(zip(fresh, arrays, strict=True))
        self.at = target
        values = {value.name: value for each in self.nodes[:target] for value in each.outputs}
        for name in [name for name in self.held[0] if name in values and not self._needed(values[name], target)]:
            for held in self.held:
                del held[name]

    def _needed(self, value: ir.Value, target: int) -> bool:
        """Whether a node from `target` on, or one inside a subgraph, uses a value."""
        return any(self.order.get(user, target) >= target for user in value.consumers())

    def run(self, names: list[str]) -> Iterator[list[NDArray[Any]]]:
        """These values for each batch, computed from what is held."""
        graph = ir.convenience.extract(self.model.graph, list(self.held[0]), names)
        for value in graph.inputs:
            array = self.held[0][value.name or ""]
            value.type = value.type or ir.TensorType(ir.DataType.from_numpy(array.dtype))
            value.shape = ir.Shape(array.shape)
        session = open_session(ir.Model(graph, ir_version=self.model.ir_version), session_options(self.threads))
        for held in self.held:
            yield run_session(session, held)


def _fit(walk: Walk, layer: Fit, wanted: list[Target], block: slice) -> None:
    """Ridge regression on a block of inputs, in each group of a layer: (groups, inputs, inputs or outputs)."""
    source = layer.node.inputs[0]
    assert source is not None
    scarce = sum(len(rows) for _, rows, _ in wanted) < PLENTY * (block.stop - block.start)
    kept, apart = Moments(), Moments()
    for held, (made,), (shape, rows, target) in zip(walk.held, walk.run([layer.end.name or ""]), wanted, strict=True):
        if made.size // made.shape[layer.axis] != math.prod(shape) // shape[layer.axis]:
            return  # what is folded into its positions was cut
        x = layer.inputs(held[source.name or ""], made.shape, rows)
        error = np.asarray((target - layer.outputs(made, rows)) / layer.scale, np.float32)
        seen, lack = (each.reshape(len(rows), layer.groups, -1).swapaxes(0, 1) for each in (x, error))
        seen = seen[..., block]
        if layer.bias is not None:
            seen = np.concatenate([seen, np.ones((*seen.shape[:2], 1), np.float32)], 2)
        first = len(rows) // 4 if scarce else 0  # rows are in the order of samples
        apart.add(seen[:, :first], lack[:, :first])
        kept.add(seen[:, first:], lack[:, first:])
    share = RIDGE
    if scarce:
        gains = {share: apart.gain(kept.solved(share)) for share in RIDGES}
        share = max(gains, key=gains.__getitem__)
        if not gains[share] > 0:
            return
        kept.gram, kept.cross = kept.gram + apart.gram, kept.cross + apart.cross
    delta = kept.solved(share)
    if np.isfinite(delta).all():
        layer.change(delta, block)


class Moments:
    """Sums over samples of inputs by inputs and of inputs by what is lacking: (groups, inputs, inputs or outputs)."""

    def __init__(self) -> None:
        self.gram = self.cross = np.zeros((1, 1, 1))

    def add(self, inputs: Sample, lack: Sample) -> None:
        """More samples: (groups, samples, inputs or outputs)."""
        turned = inputs.swapaxes(1, 2)
        self.gram = self.gram + (turned @ inputs).astype(np.float64)
        self.cross = self.cross + (turned @ lack).astype(np.float64)

    def solved(self, share: float) -> Array:
        """The change of the weights that makes up for what is lacking, by ridge regression."""
        means = np.trace(self.gram, axis1=1, axis2=2) / self.gram.shape[1]
        ridge = share * np.maximum(means, max(SILENT * float(means.mean()), 1e-12))
        return np.linalg.solve(self.gram + ridge[:, None, None] * np.eye(self.gram.shape[1]), self.cross)

    def gain(self, delta: Array) -> float:
        """By how much a change lowers the sum of squares of what is lacking."""
        return float(2 * (delta * self.cross).sum() - (delta * (self.gram @ delta)).sum())


def _patches(node: ir.Node, array: NDArray[np.floating], shape: tuple[int, ...], rows: NDArray[np.int64]) -> Sample:
    """The windows from which positions of a convolution's output are computed: (rows, channels x taps)."""
    space = len(shape) - 2
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None
    kernel = tuple(int(dim) for dim in weight.const_value.shape.numpy())[2:]
    steps, gaps = (integers(node, name) or [1] * space for name in ("strides", "dilations"))
    pads = integers(node, "pads") or [0] * 2 * space
    padded = np.pad(array, [(0, 0), (0, 0), *zip(pads[:space], pads[space:], strict=True)])
    sample, *where = np.unravel_index(rows, (shape[0], *shape[2:]))
    taps = []
    for offset in np.ndindex(*kernel):
        at = [w * step + o * gap for w, step, o, gap in zip(where, steps, offset, gaps, strict=True)]
        taps.append(padded[(sample, slice(None), *at)])
    return np.asarray(np.stack(taps, 2).reshape(len(rows), -1), np.float32)


def _set(value: ir.Value, array: Array) -> None:
    assert value.const_value is not None
    value.const_value = ir.tensor(array.astype(value.const_value.dtype.numpy()), name=value.name)
