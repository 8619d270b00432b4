"""Repair without training: what is left of every layer is fitted to what the uncut layer computed.

For each product, in order: with X its inputs in the cut model and E what its outputs lack against the uncut model's,
the change of its weights is the ridge regression `(X'X + lambda I)^-1 X'E`, with a column of ones for the bias. Inputs
are the cut model's own, with everything before repaired already, so that errors don't pile up (He et al. 2017, Channel
Pruning, section 3.1, equation 5; Luo et al. 2017, ThiNet, equation 7). Labels aren't needed. Nodes that share weights
are fitted together. Recurrent layers are fitted before their gates (`recurrent.py`), scales and shifts of normalisation
channel by channel. Where samples are scarce, lambda is what does best on samples that are held out; a layer that gains
nothing on those is left as it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.cutting.plan import Plan
from onnxprune.errors import ModelError
from onnxprune.evaluating.data import Dataset, batches, fixed_batch
from onnxprune.evaluating.evaluate import Batch, run_session
from onnxprune.graph.floats import Twin, in_floats
from onnxprune.graph.model import constant, open_session
from onnxprune.graph.threads import session_options
from onnxprune.labels.flow import operator_name
from onnxprune.labels.recurrent import GATES
from onnxprune.labels.units import weight_matrix
from onnxprune.repairing.moments import SILENT, Array, Moments, Sample
from onnxprune.repairing.products import Product, Unfit, bias_of, product_of
from onnxprune.repairing.recurrent import STATES, Recurrent, Wanted
from onnxprune.repairing.scales import scaling_of
from onnxprune.repairing.walk import Walk

SAMPLES = 512  # calibration samples
SIZE, FEW = 32, 4  # samples in a batch; in one by which memory is told
ROWS = 16384  # positions that a layer is fitted on, at most
MEMORY = 2**31  # bytes, of which a half is for inner values, a quarter each for uncut outputs and for Gram matrices
TENSORS, COPIES = 3, 4  # inner values of the largest size at once; float64 arrays while a layer is solved for
NARROWEST = 16  # inputs at a time, below which a layer is left alone
PLENTY = 8  # positions for each input, below which more strengths are tried, and what is held out is used after all
RIDGES = (1e-6, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # lambda, in units of the mean diagonal of the Gram matrix
FEW_RIDGES = (1e-6, 1e-3)
APART = 8  # one of so many positions is held out to choose it by where there are plenty, one of four where not


@dataclass(frozen=True)
class Repaired:
    """What became of one layer: `gained` is the share of what it lacked, on held-out samples, that it won back."""

    layer: str
    kind: str
    gained: float | None = None
    why_not: str = ""

    def to_json(self) -> dict[str, Any]:
        """The row as JSON."""
        return {"layer": self.layer, "kind": self.kind, "gained": self.gained, "why_not": self.why_not}


@dataclass(frozen=True)
class Target:
    """What the uncut model has at some positions of a value: its shape after the cut, the positions, and those."""

    shape: tuple[int, ...]
    rows: NDArray[np.int64]
    values: Sample  # (positions, groups, channels)


@dataclass(frozen=True)
class Use:
    """One node of a layer, and where its outputs are compared with the uncut ones.

    That is at `end`: the sum that it is a branch of, if any, so that it makes up for what the others lack as well; else
    its own output. `scale` is what a change of its output is multiplied with on the way, by channel.
    """

    product: Product
    bias: ir.Value | None
    end: ir.Value
    scale: Array


@dataclass(frozen=True)
class Linear:
    """A layer that is linear in its weights: all nodes that use them."""

    weight: ir.Value
    uses: list[Use]
    removals: dict[str, list[tuple[int, list[int]]]]  # by end: axes and what is kept of them

    @property
    def node(self) -> ir.Node:
        """The first node."""
        return self.uses[0].product.node

    @property
    def nodes(self) -> list[ir.Node]:
        """All of its nodes."""
        return [use.product.node for use in self.uses]

    @property
    def weights(self) -> list[ir.Value]:
        """The initializers that a fit changes."""
        return [self.weight, *(use.bias for use in self.uses if use.bias is not None)]

    @property
    def kind(self) -> str:
        """What a person calls it."""
        shared = f", shared by {len(self.uses)}" if len(self.uses) > 1 else ""
        return f"{self.node.op_type}{shared}"

    @property
    def ends(self) -> list[str]:
        """The values of the uncut model that it is compared with."""
        return [use.end.name or "" for use in self.uses]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Groups, inputs and outputs."""
        groups, inputs, outputs = self.matrix().shape
        return groups, inputs, outputs

    def matrix(self) -> Array:
        """The weights as (groups, inputs, outputs)."""
        return np.asarray(self.uses[0].product.matrix(np.asarray(constant(self.weight), np.float64)), np.float64)

    @property
    def widths(self) -> int:
        """Numbers that are held for each position."""
        groups, _, outputs = self.sizes
        return groups * outputs

    def wanted(self, arrays: dict[str, NDArray[Any]], limit: int, random: np.random.Generator) -> list[Target]:
        """What the uncut model has at up to `limit` positions of a batch, for each node."""
        found, share = [], max(1, limit // len(self.uses))
        for use in self.uses:
            array, name = arrays[use.end.name or ""], use.end.name or ""
            for axis, kept in self.removals.get(name, ()):
                array = array.take(kept, axis)
            laid = use.product.lay(array)
            rows = np.sort(random.choice(len(laid), min(share, len(laid)), replace=False))
            found.append(Target(array.shape, rows, np.asarray(laid[rows], np.float32)))
        return found

    def fit(self, walk: Walk, twin: Twin, wanted: Sequence[list[Target]], block: slice) -> float:
        """Ridge regression on a block of inputs; returns the share of what was lacking that it won back."""
        biases = list(dict.fromkeys(use.bias for use in self.uses if use.bias is not None))
        factors = [self.uses[0].product.factor(index) for index in (0, 1)]
        if not all(factors):
            raise Unfit("it is multiplied with zero")
        positions = sum(len(target.rows) for targets in wanted for target in targets)
        scarce = positions < PLENTY * (block.stop - block.start)
        kept, apart = self._moments(walk, wanted, block, biases, 4 if scarce else APART)
        judged = apart if apart.rows else kept
        found = {share: kept.solved(share) for share in (RIDGES if scarce else FEW_RIDGES)}
        gains = {share: judged.gain(delta) for share, delta in found.items() if np.isfinite(delta).all()}
        share = max(gains, key=gains.__getitem__, default=0.0)
        if not gains or not gains[share] > 0:
            return 0.0
        delta, gained = found[share], gains[share] / max(judged.square, 1e-30)
        if scarce:
            kept.merge(apart)
            delta = kept.solved(share)
        return gained if self._change(twin, delta, block, biases, kept) else 0.0

    def _moments(
        self, walk: Walk, wanted: Sequence[list[Target]], block: slice, biases: list[ir.Value], part: int
    ) -> tuple[Moments, Moments]:
        """What is fitted on, and what is held out: the first positions of each batch, which are in order of samples."""
        kept, apart = Moments(), Moments()
        names = [name for use in self.uses for name in (use.end.name or "", use.product.source.name or "")]
        for arrays, targets in zip(walk.values(names), wanted, strict=True):
            for use, target in zip(self.uses, targets, strict=True):
                made = arrays[use.end.name or ""]
                if made.shape != target.shape:
                    raise Unfit("what is folded into its positions was cut")
                x = use.product.inputs(arrays[use.product.source.name or ""], made.shape, target.rows)
                lack = np.asarray((target.values - use.product.lay(made)[target.rows]) / use.scale, np.float32)
                seen, lack = x.swapaxes(0, 1)[..., block] * np.float32(use.product.factor(0)), lack.swapaxes(0, 1)
                ones = np.zeros((*seen.shape[:2], len(biases)), np.float32)
                if use.bias is not None:
                    ones[..., biases.index(use.bias)] = use.product.factor(1)
                seen = np.concatenate([seen, ones], 2)
                first = len(target.rows) // part
                apart.add(seen[:, :first], lack[:, :first])
                kept.add(seen[:, first:], lack[:, first:])
        return kept, apart

    def _change(self, twin: Twin, delta: Array, block: slice, biases: list[ir.Value], kept: Moments) -> bool:
        """Adds a change of shape (groups, inputs in the block, outputs), with more inputs for the biases."""
        width = block.stop - block.start
        before = self.matrix()
        after = before.copy()
        after[:, block] += delta[:, :width]
        product, shape = self.uses[0].product, constant(self.weight).shape

        def lack(weights: Array) -> float:
            moved = delta.copy()
            moved[:, :width] = np.asarray(product.matrix(weights), np.float64)[:, block] - before[:, block]
            return -kept.gain(moved)

        if not twin.write(self.weight, product.unlay(after, shape), lack):
            return False
        for index, bias in enumerate(biases):
            array = np.array(constant(bias), np.float64)
            twin.write(bias, array + delta[:, width + index].reshape(array.shape), lambda _: -1.0)
        return True


Layer = Linear | Recurrent


@dataclass
class Found:
    """The layers of a model that can be fitted, in order, and those that can't, with the reason."""

    layers: list[Layer] = field(default_factory=list)
    refused: list[Repaired] = field(default_factory=list)


def reconstruct(
    model: ir.Model,
    baseline: ir.Model,
    plan: Plan,
    data: Dataset,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    memory: int | None = None,
    note: Callable[[str], None] = lambda text: None,
    share: float = 1.0,
    reading: Collection[str] | None = None,
) -> list[Repaired]:
    """Fits every layer of a cut model that can be, in place; returns what became of each.

    `plan` says what the model lost of `baseline`, whose value names it has. `memory` bounds, in bytes, what is held
    beside the models and the runtime's own: fewer samples and positions, and layers whose Gram matrix would be too
    large are fitted to a part of their inputs after the other; `note` is told of those. Each layer is fitted on up to
    512 samples and 16,384 positions, or a `share` of both. With `reading` only those are that read these values first,
    before any other layer: what a small cut needs, and soon done. A fit that fails leaves its layer as it was, with
    the reason.
    """
    memory = memory or MEMORY
    twin, whole = in_floats(model), in_floats(baseline).model
    found = find_layers(twin.model, whole, plan)
    layers = found.layers if reading is None else _first_readers(twin.model, found.layers, reading)
    if not layers or len(data) < (fixed_batch(model) or 1):
        return found.refused
    feeds, wanted = _uncut_outputs(whole, layers, data, threads, (memory, share))
    walk = Walk(twin.model, feeds[: len(wanted[0])], threads)
    if len(wanted[0]) < len(feeds):
        note(f"repair: {len(wanted[0])} of {len(feeds)} batches of calibration data fit into {memory >> 20} MB")
    parted, results = list[str](), list[Repaired]()
    for number, layer in enumerate(layers):
        progress(number + 1, len(layers))
        results.append(_fitted(walk, twin, layer, wanted[number], memory, parted))
        wanted[number] = []
    if parted:
        note(f"repair: {len(parted)} layers were fitted to parts of their inputs for want of memory, as {parted[0]}")
    return results + found.refused


def _fitted(walk: Walk, twin: Twin, layer: Layer, wanted: Sequence[Any], memory: int, parted: list[str]) -> Repaired:
    name = _name_of(layer.node)
    undo: Callable[[], None] = lambda: None  # noqa: E731
    try:
        walk.reach(layer.node)
        undo = twin.hold([value for value in layer.weights if value in twin.forms])
        if isinstance(layer, Recurrent):
            return Repaired(name, layer.node.op_type, layer.fit(walk, twin, wanted))
        blocks, left = list(_blocks(layer, memory // 4)), 1.0
        parted += [name] * (len(blocks) != 1)
        if not blocks:
            raise Unfit("memory is too small for a part of its inputs")
        for block in blocks:
            left *= 1 - layer.fit(walk, twin, wanted, block)
        return Repaired(name, layer.kind, 1 - left)
    except (Unfit, ModelError, np.linalg.LinAlgError, MemoryError, ValueError, IndexError) as error:
        undo()
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Repaired(name, layer.node.op_type, None, reason)


def _name_of(node: ir.Node) -> str:
    """The name of a node in the model itself: in floats, fused ones are in parts."""
    name = node.name or node.outputs[0].name or ""
    for part in (".floats", ".product", ".normalised"):
        name = name.removesuffix(part)
    return name


def _blocks(layer: Linear, memory: int) -> Iterator[slice]:
    """The inputs of a layer in as few parts as memory allows for Gram matrices; nothing where they'd be too narrow."""
    groups, inputs, outputs = layer.sizes
    numbers = memory // (8 * COPIES * groups)
    widest = int((math.sqrt(outputs**2 + 4 * numbers) - outputs) / 2)
    if widest >= min(NARROWEST, inputs):
        edges = np.linspace(0, inputs, -(-inputs // widest) + 1).astype(int)
        yield from (slice(int(a), int(b)) for a, b in itertools.pairwise(edges))


TABLES = {"Gather", "Add", "Sub", "Mul", "Div", "Where", "Expand", "Concat", "Slice"}  # no products
PASSING = {"DequantizeLinear", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze"}  # a weight on its way to one


def unrepairable(model: ir.Model) -> dict[str, str]:
    """The nodes of a normalised model, by name, whose weights no repair would fit, with the reason for each."""
    twin = in_floats(model)
    found = find_layers(twin.model, twin.model, Plan({}))
    fitted = {node.name for layer in found.layers for node in layer.nodes}
    reasons = {each.layer: each.why_not for each in found.refused}
    for layer in found.layers:
        if isinstance(layer, Recurrent):
            try:
                layer.check(twin)
            except Unfit as error:
                reasons[_name_of(layer.node)] = str(error)
                fitted.discard(layer.node.name)
    left = dict[str, str]()
    for node in twin.model.graph:
        held = any(value is not None and _is_matrix(_stored(value)) for value in node.inputs)
        if held and node.name not in fitted and operator_name(node) not in TABLES | PASSING:
            left[_name_of(node)] = reasons.get(_name_of(node), f"{operator_name(node)} isn't fitted")
    return left


def _stored(value: ir.Value) -> ir.Value:
    """The initializer behind an operand that is dequantised, cast or moved; else the operand."""
    node = value.producer()
    while node is not None and operator_name(node) in PASSING and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value if value.is_initializer() else None
    return tensor is not None and sum(int(dim) > 1 for dim in tensor.shape.numpy()) > 1


def find_layers(model: ir.Model, baseline: ir.Model, plan: Plan) -> Found:
    """What can be fitted in a cut model in floats, and what can't."""
    known = {value.name: node for node in baseline.graph for value in node.outputs}
    found, seen = Found(), set[ir.Value]()
    for node in model.graph:
        name = node.outputs[0].name or ""
        if operator_name(node) in GATES:
            _find_recurrent(node, baseline, plan, found)
            continue
        product = product_of(node) or scaling_of(node)
        if product is None:
            continue
        if product.weight in seen or name not in known:
            continue
        seen.add(product.weight)
        try:
            found.layers.append(_linear(product, known, plan))
        except Unfit as error:
            found.refused.append(Repaired(_name_of(node), node.op_type, None, str(error)))
    return found


def _first_readers(model: ir.Model, layers: list[Layer], names: Collection[str]) -> list[Layer]:
    """The layers that read values of these names, through other operators but through no other layer."""
    fitted = {node for layer in layers for node in layer.nodes}
    given = {*model.graph.inputs, *(value for node in model.graph for value in node.outputs)}
    pending, seen, found = [value for value in given if value.name in names], set[ir.Value](), set[ir.Node]()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        for node in value.consumers():
            if node in fitted:
                found.add(node)
            else:
                pending += node.outputs
    return [
        layer
        for layer in layers
        if found.intersection(layer.nodes)
        or (isinstance(layer, Recurrent) and any(value.name in names for value in layer.node.outputs))
    ]


def _find_recurrent(node: ir.Node, baseline: ir.Model, plan: Plan, found: Found) -> None:
    uncut = next((each for each in baseline.graph if each.name == node.name), None)
    if uncut is None:
        return
    for each in (node, uncut):
        if not each.outputs[0].name:
            each.outputs[0].name = f"{node.name}.{STATES}"
    removals = {removal.axis: removal for removal in plan.tensors.get(_cut_output(uncut, plan), ())}
    kept = next((removal.kept() for removal in removals.values()), None)
    found.layers.append(Recurrent(node, uncut, kept))


def _cut_output(node: ir.Node, plan: Plan) -> str:
    """An output of a recurrent layer that the plan speaks of; all end in the same units."""
    return next((value.name for value in node.outputs if value.name and value.name in plan.tensors), "")


def _linear(product: Product, known: dict[str | None, ir.Node], plan: Plan) -> Linear:
    """The layer of all nodes that use the same weights. Raises `Unfit` where one of them does something else."""
    weight, uses = product.weight, list[Use]()
    array = np.asarray(constant(weight))
    numbered = np.arange(array.size, dtype=np.float64).reshape(array.shape)
    laid = product.matrix(numbered)
    for user, _ in weight.uses():
        own = product if user is product.node else product_of(user) or scaling_of(user)
        if (
            own is None
            or type(own) is not type(product)
            or own.weight is not weight
            or own.factor(0) != product.factor(0)
            or not np.array_equal(laid, own.matrix(numbered))
        ):
            raise Unfit(f"its weights are used by {user.op_type} {user.name} in another way")
        end, scale = _end(user)
        if end.name not in known:
            end, scale = user.outputs[0], np.ones(1)
        if end.name not in known:
            raise Unfit("its output isn't one of the uncut model")
        groups, _, outputs = laid.shape
        wide = scale if scale.size == 1 else scale.reshape(groups, outputs)
        uses.append(Use(own, bias_of(own, groups * outputs), end, wide))
    removals = {
        use.end.name or "": [(removal.axis, removal.kept()) for removal in plan.tensors.get(use.end.name or "", ())]
        for use in uses
    }
    return Linear(weight, uses, removals)


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


def _uncut_outputs(
    baseline: ir.Model, layers: list[Layer], data: Dataset, threads: int | None, bounds: tuple[int, float]
) -> tuple[Sequence[Batch], list[list[list[Target] | list[Wanted]]]]:
    """Calibration batches, and what the uncut model computes where each layer ends for as many as memory allows."""
    memory, share = bounds
    positions = int(share * ROWS)
    names = list(dict.fromkeys(name for layer in layers for name in layer.ends))
    given = {value.name for value in baseline.graph.inputs}
    computed = [name for name in names if name not in given]
    graph = ir.convenience.extract(baseline.graph, baseline.graph.inputs, computed)
    session = open_session(ir.Model(graph, ir_version=baseline.ir_version), session_options(threads))
    feeds = _feeds(
        baseline, session, data.take(slice(0, max(fixed_batch(baseline) or SIZE, int(share * SAMPLES)))), memory
    )
    random = np.random.default_rng(0)
    found: list[list[list[Target] | list[Wanted]]] = [[] for _ in layers]
    for number, batch in enumerate(feeds):
        arrays = {**batch, **dict(zip(computed, run_session(session, batch), strict=True))}
        if number >= max(1, memory // 2 // (TENSORS * max(arrays[name].nbytes for name in names))):
            break
        limit = max(1, min(positions, memory // 4 // (4 * sum(layer.widths for layer in layers))) // len(feeds))
        for layer, targets in zip(layers, found, strict=True):
            targets.append(layer.wanted(arrays, limit, random))
    return feeds, found


def _feeds(baseline: ir.Model, session: Any, data: Dataset, memory: int) -> Sequence[Batch]:
    """Calibration batches of equal size, as large as memory allows."""
    fixed, count = fixed_batch(baseline), min(SAMPLES, len(data))
    size = fixed or -(-count // -(-count // SIZE))  # 38 samples are two batches of 19
    if fixed is None and size > FEW:
        few = run_session(session, next(batches(data.take(slice(0, FEW)), FEW)))
        size = max(FEW, min(size, FEW * (memory // 2) // sum(array.nbytes for array in few)))
    return list(batches(data.take(slice(0, count // size * size)), size))
