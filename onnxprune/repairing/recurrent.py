"""Recurrent layers fitted before their gates.

With Z = W x(t) + R h(t-1) + b the sums before the gates: what the uncut model has there, at the units that stay, is the
target; the inputs are the cut model's own x(t) and h(t-1), everything before repaired already. Ridge regression on what
lacks changes W, R and b at once. Then the layer's own h are others, so it is run and fitted again, a few times. What
lacks is the difference of the sums, or of what the gates make of them, since sums far out would outweigh all others
without a difference behind the gate. Errors feed back, so lambda is larger than where they don't, and what is kept is
what brings the states nearest to the uncut ones on samples that are held out, running freely. Nobody seems to have
published closed-form repair of such layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnxprune.graph.floats import Twin
from onnxprune.graph.model import constant
from onnxprune.labels.flow import given, integer
from onnxprune.labels.recurrent import GATES
from onnxprune.repairing.moments import Array, Moments, Sample
from onnxprune.repairing.products import Unfit
from onnxprune.repairing.walk import Walk

SWEEPS = 10
STRENGTHS = (1.0, 0.1, 0.01)  # lambda to begin with, in units of the mean diagonal of the Gram matrix
BEHIND = (False, True)  # whether what lacks is taken as the gates let it through
Way = tuple[float, bool]  # one of each
WORTH = 0.02  # share of what lacks that another sweep must bring
STEP = 10.0  # between strengths that are tried next: weaker ones once the states are nearer, else stronger ones
NEAR = 1e-8  # of the squared residual, at which conjugate gradients have converged
DIRECT = 1e9  # multiplications, up to which a gated recurrence is solved unit by unit
USUAL = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
STATES = "states"  # the name given to an output of all states that a model leaves out
Floats = NDArray[np.floating]
Chosen = tuple[NDArray[np.int64], NDArray[np.int64]]  # steps and samples


@dataclass(frozen=True)
class Wanted:
    """What the uncut layer had at some steps of some samples, at the units that stay: in one direction of one batch."""

    steps: NDArray[np.int64]
    samples: NDArray[np.int64]
    sums: Floats  # before the gates: (positions, gates x units)
    states: Floats  # after them: (positions, units)


def refuse(node: ir.Node) -> None:
    """Raises `Unfit` for what isn't understood."""
    if integer(node, "layout", 0):
        raise Unfit("its batch lies first")
    if not usual(node) and (node.op_type == "GRU" or given(node, 7) is not None):
        raise Unfit("its activations aren't the usual ones")


def usual(node: ir.Node) -> bool:
    """Whether a layer has the activations that the standard gives it, with nothing changed about them."""
    names = (
        [str(name) for name in node.attributes["activations"].as_strings()] if "activations" in node.attributes else []
    )
    kind = node.op_type
    standard = USUAL[kind] * (len(names) // len(USUAL[kind]))
    coupled = any(name in node.attributes for name in ("clip", "activation_alpha", "activation_beta", "input_forget"))
    return [name.lower() for name in names] == [name.lower() for name in standard] and not coupled


@dataclass(frozen=True)
class Parameters:
    """The weights of a recurrent layer in one direction, in float64: w (g h, i), r (g h, h), b (2 g h), p (3 h)."""

    kind: str
    w: Array
    r: Array
    b: Array | None
    p: Array | None
    after: bool  # the reset gate of a GRU acts after the product with R

    @classmethod
    def of(cls, node: ir.Node, direction: int) -> Parameters:
        """Those of a node."""
        arrays = [constant(given(node, index)) for index in (1, 2, 3, 7)]
        if arrays[0] is None or arrays[1] is None or (given(node, 3) is not None and arrays[2] is None):
            raise Unfit("its weights are computed")
        w, r, b, p = (None if array is None else np.asarray(array[direction], np.float64) for array in arrays)
        assert w is not None and r is not None
        return cls(node.op_type, w, r, b, p, bool(integer(node, "linear_before_reset", 0)))

    def sums(self, x: Floats, h: Floats, cells: tuple[Floats, Floats] | None = None) -> Floats:
        """Z at some positions: (positions, gates x units). `cells` before and after the step, for peepholes."""
        size = self.r.shape[1]
        bias = np.zeros(2 * len(self.w)) if self.b is None else self.b
        z = x @ self.w.T.astype(np.float32) + (bias[: len(self.w)]).astype(np.float32)
        own = h @ self.r.T.astype(np.float32) + (bias[len(self.w) :]).astype(np.float32)
        if self.kind != "GRU":
            z = z + own
            if self.p is not None and cells is not None:
                before, after = cells
                z = z + np.concatenate([before * self.p[:size], after * self.p[size : 2 * size],
                                        before * self.p[2 * size :], np.zeros_like(before)], 1)  # fmt: skip
            return np.asarray(z, np.float32)
        z[:, : 2 * size] += own[:, : 2 * size]
        reset = _sigmoid(z[:, size : 2 * size])
        if self.after:
            z[:, 2 * size :] += reset * own[:, 2 * size :]
        else:
            rest = slice(2 * size, None)
            z[:, rest] += (reset * h) @ self.r[rest].T.astype(np.float32) + bias[len(self.w) :][rest].astype(np.float32)
        return np.asarray(z, np.float32)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -60, 60))), np.float32)


@dataclass(frozen=True)
class Run:
    """One batch of a recurrent layer: x (steps, samples, inputs), all states (steps, directions, samples, units)."""

    x: Floats
    states: Floats
    first: Floats | None  # initial states (directions, samples, units)
    cell: Floats | None
    lengths: NDArray[np.int64]

    def before(self, direction: int, back: bool, at: Chosen) -> Floats:
        """The states before these steps."""
        steps, samples = at
        width = self.states.shape[3]
        zero = np.zeros((self.states.shape[2], width), np.float32)
        first = zero if self.first is None else self.first[direction]
        last = self.lengths[samples] - 1
        starts = steps == (last if back else 0)
        earlier = np.clip(steps + (1 if back else -1), 0, len(self.states) - 1)
        return np.where(starts[:, None], first[samples], self.states[earlier, direction, samples])


def _cells(run: Run, parameters: Parameters, direction: int, back: bool) -> Floats:
    """The cells of an LSTM with peepholes after every step: (steps, samples, units)."""
    length, samples, units = len(run.x), run.x.shape[1], parameters.r.shape[1]
    zero = np.zeros((samples, units), np.float32)
    c = zero if run.cell is None else run.cell[direction]
    found = np.zeros((length, samples, units), np.float32)
    everyone = np.arange(samples)
    for step in range(length - 1, -1, -1) if back else range(length):
        at = (np.full(samples, step), everyone)
        z = parameters.sums(run.x[step], run.before(direction, back, at), (c, zero))
        i, f, g = (z[:, k * units : (k + 1) * units] for k in (0, 2, 3))
        new = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        c = np.where((step < run.lengths)[:, None], new, c)
        found[step] = c
    return found


def _sums_at(run: Run, parameters: Parameters, direction: int, back: bool, at: Chosen) -> Floats:
    """Z at these steps of these samples."""
    x, h = run.x[at], run.before(direction, back, at)
    if parameters.p is None:
        return parameters.sums(x, h)
    cells = _cells(run, parameters, direction, back)
    steps, samples = at
    starts = steps == (run.lengths[samples] - 1 if back else 0)
    first = np.zeros_like(cells[0]) if run.cell is None else run.cell[direction]
    earlier = np.clip(steps + (1 if back else -1), 0, len(cells) - 1)
    return parameters.sums(x, h, (np.where(starts[:, None], first[samples], cells[earlier, samples]), cells[at]))


@dataclass(frozen=True)
class Recurrent:
    """A recurrent layer that can be fitted: its node in the twin of the cut model, and in that of the uncut one."""

    node: ir.Node
    uncut: ir.Node
    kept: list[int] | None

    @property
    def nodes(self) -> list[ir.Node]:
        """All of its nodes."""
        return [self.node]

    def check(self, twin: Twin) -> None:
        """Raises `Unfit` where the layer can't be fitted."""
        refuse(self.node)
        if any(len(value.uses()) != 1 or value not in twin.forms for value in self.weights):
            raise Unfit("its weights are shared or computed")

    @property
    def weights(self) -> list[ir.Value]:
        """The initializers that a fit changes."""
        return [value for value in (given(self.node, index) for index in (1, 2, 3)) if value is not None]

    @property
    def ends(self) -> list[str]:
        """What of the uncut model is compared with, and what it is made from."""
        return names_of(self.uncut)

    @property
    def widths(self) -> int:
        """Numbers that are held for each position."""
        size = integer(self.node, "hidden_size", 0)
        return (GATES[self.node.op_type] + 1) * size * self._directions

    @property
    def _directions(self) -> int:
        weight = constant(self.node.inputs[1])
        return 1 if weight is None else len(weight)

    def _backward(self) -> list[bool]:
        kind = self.node.attributes["direction"].as_string() if "direction" in self.node.attributes else "forward"
        return {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[kind]

    def wanted(self, arrays: dict[str, NDArray[Any]], limit: int, random: np.random.Generator) -> list[Wanted]:
        """What the uncut layer had at up to `limit` positions of a batch, in each direction."""
        run, found = run_of(self.uncut, arrays), []
        units = integer(self.uncut, "hidden_size", 0)
        kept = list(range(units)) if self.kept is None else self.kept
        columns = [gate * units + unit for gate in range(GATES[self.uncut.op_type]) for unit in kept]
        samples, steps = np.nonzero(np.arange(len(run.x)) < run.lengths[:, None])  # in the order of samples
        for direction, back in enumerate(self._backward()):
            chosen = np.sort(random.choice(len(steps), min(limit, len(steps)), replace=False))
            at = (steps[chosen], samples[chosen])
            sums = _sums_at(run, Parameters.of(self.uncut, direction), direction, back, at)
            found.append(Wanted(*at, sums[:, columns], run.states[at[0], direction, at[1]][:, kept]))
        return found

    def fit(self, walk: Walk, twin: Twin, wanted: Sequence[list[Wanted]]) -> float:
        """Fits the layer; returns the share of what its states lacked, on held-out samples, that it won back."""
        self.check(twin)
        values = self.weights
        before, systems = self._pass(walk, wanted)
        if before <= 0:
            return 0.0
        best, keep, last = before, twin.hold(values), (0.0, False)
        tried: tuple[Way, ...] = tuple(itertools.product(STRENGTHS, BEHIND if usual(self.node) else BEHIND[:1]))
        stronger = False
        for _ in range(SWEEPS):
            reached, following = best, systems
            for way in tried:
                if not self._set(twin, values, systems, way):
                    continue
                now, after = self._pass(walk, wanted)
                if now < best:
                    best, keep, last, following = now, twin.hold(values), way, after
            if best < reached * (1 - WORTH):
                systems, tried, stronger = following, (last, (last[0] / STEP, last[1])), True
            elif last[0] and stronger:
                systems, tried, stronger = following, ((last[0] * STEP, last[1]), (last[0], not last[1])), False
            else:
                break
        keep()
        return 1 - best / before

    def _set(self, twin: Twin, values: list[ir.Value], systems: list[Systems], way: Way) -> bool:
        """The weights after a ridge regression; whether they are finite, else nothing is changed."""
        solved = [each.solved(*way) for each in systems]
        arrays = [np.stack(parts) for parts in zip(*solved, strict=True)]
        if not all(np.isfinite(array).all() for array in arrays):
            return False
        for value, array in zip(values, arrays, strict=True):
            twin.write(value, array, partial(_distance, wished=array))
        return True

    def _pass(self, walk: Walk, wanted: Sequence[list[Wanted]]) -> tuple[float, list[Systems]]:
        """Squares of what the states lack on held-out samples, running freely, and what a regression needs.

        On all samples where none are held out.
        """
        backward = self._backward()
        own = [Parameters.of(self.node, direction) for direction in range(len(backward))]
        systems, lacks, everywhere = [Systems(each) for each in own], 0.0, 0.0
        for run, targets in zip(self._runs(walk), wanted, strict=True):
            for direction, (target, back) in enumerate(zip(targets, backward, strict=True)):
                apart = held_out(target.samples, run.x.shape[1])
                off = target.states - run.states[target.steps, direction, target.samples]
                squares = np.square(off, dtype=np.float64).sum(1)
                lacks, everywhere = lacks + float(squares[apart].sum()), everywhere + float(squares.sum())
                at = (target.steps[~apart], target.samples[~apart])
                z = _sums_at(run, own[direction], direction, back, at)
                lack = target.sums[~apart] - z
                systems[direction].add(run.x[at], run.before(direction, back, at), z, lack)
        return lacks or everywhere, systems

    def _runs(self, walk: Walk) -> Iterator[Run]:
        for arrays in walk.values(names_of(self.node)):
            yield run_of(self.node, arrays)


def held_out(samples: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """The last quarter of a batch."""
    return samples >= count - count // 4


def _distance(other: Array, wished: Array) -> float:
    """How far weights are from those wished, less than any constant: storing them is always a gain here."""
    return float(np.square(other - wished).sum() - np.square(wished).sum()) - 1e-30


def names_of(node: ir.Node) -> list[str]:
    """The values that a run of a layer is told by: x, all states, lengths, initial states and cells."""
    parts = [node.inputs[0], node.outputs[0], *(given(node, index) for index in (4, 5, 6))]
    return [value.name or "" for value in parts if value is not None and constant(value) is None]


def run_of(node: ir.Node, arrays: dict[str, NDArray[Any]]) -> Run:
    """A batch of a layer, from the values by name."""

    def array(value: ir.Value | None) -> Any:
        if value is None:
            return None
        return constant(value) if constant(value) is not None else arrays[value.name or ""]

    x, states = np.asarray(array(node.inputs[0]), np.float32), np.asarray(array(node.outputs[0]), np.float32)
    lengths, first, cell = (array(given(node, index)) for index in (4, 5, 6))
    whole = np.full(x.shape[1], len(x), np.int64)
    return Run(x, states, first, cell, whole if lengths is None else np.asarray(lengths, np.int64))


class Systems:
    """The regressions of one direction: gates that see [x, h, 1] together, and the candidate of a GRU behind them.

    The candidate is fitted with the reset gate as it is once that is fitted.
    """

    def __init__(self, own: Parameters) -> None:
        self.own, self.size = own, own.r.shape[1]
        self.gates = Moments()
        self.parts: list[tuple[Floats, Floats, Floats, Floats]] = []  # x, h, sums and what they lack, of a GRU

    def add(self, x: Floats, h: Floats, sums: Floats, lack: Floats) -> None:
        """Positions with their sums before the gates, and what those lack."""
        x, h, lack = (np.asarray(each, np.float32) for each in (x, h, lack))
        behind = _behind(self.own.kind, self.size, sums, lack)
        count = lack.shape[1] if self.own.kind != "GRU" else 2 * self.size
        both = np.concatenate([lack[:, :count], behind[:, :count]], 1)
        self.gates.add(self._seen(x, h)[None], both[None])
        if self.own.kind == "GRU":
            self.parts.append((x, h, sums, lack))

    def _seen(self, x: Floats, h: Floats) -> Sample:
        ones = np.ones((len(x), 0 if self.own.b is None else 1), np.float32)
        return np.concatenate([x, h, ones], 1).astype(np.float32)

    def solved(self, strength: float, behind: bool) -> list[Array]:
        """The new w, r and b, from what lacks in the sums or `behind` the gates."""
        own, inputs = self.own, self.own.w.shape[1]
        both = self.gates.solved(strength)[0]
        half = both.shape[1] // 2
        delta = both[:, half:] if behind else both[:, :half]
        w, r = own.w.copy(), own.r.copy()
        b = None if own.b is None else own.b.copy()
        made = delta.shape[1]
        w[:made] += delta[:inputs].T
        r[:made] += delta[inputs : inputs + self.size].T
        if b is not None:
            b[:made] += delta[-1]
        if own.kind == "GRU":
            self._candidate((strength, behind), delta, w, r, b)
        return [w, r] if b is None else [w, r, b]

    def _candidate(self, way: Way, gates: Array, w: Array, r: Array, b: Array | None) -> None:
        """The candidate of a GRU, with its reset gate as these changes of the `gates` make it."""
        x, h, sums, lack = (np.concatenate(each) for each in zip(*self.parts, strict=True))
        size, rest = self.size, slice(2 * self.size, None)
        change = (self._seen(x, h) @ gates[:, size:].astype(np.float32)).astype(np.float32)
        before = _sigmoid(sums[:, size : 2 * size])
        after = _sigmoid(sums[:, size : 2 * size] + change)
        bias = np.zeros(len(self.own.w)) if self.own.b is None else self.own.b[len(self.own.w) :]
        ones = np.ones((len(x), 0 if b is None else 1), np.float32)
        matrix, target = self.own.r[rest].T.astype(np.float32), sums[:, rest] + lack[:, rest]
        if not self.own.after:
            now = sums[:, rest] + ((after - before) * h) @ matrix
            lack = np.tanh(target) - np.tanh(now) if way[1] else target - now
            system = Moments()
            system.add(np.concatenate([x, after * h, ones], 1)[None], lack[None])
            delta = system.solved(way[0])[0]
            direct, behind = np.concatenate([delta[: x.shape[1]], delta[-1:]]), delta[x.shape[1] :]
        else:
            now = sums[:, rest] + (after - before) * (h @ matrix + bias[rest].astype(np.float32))
            lack = np.tanh(target) - np.tanh(now) if way[1] else target - now
            inputs = np.concatenate([x, ones], 1), np.concatenate([h, ones], 1)
            direct, behind = _around_reset(*inputs, after, lack, way[0])
        w[rest] += direct[: x.shape[1]].T
        r[rest] += behind[: h.shape[1]].T
        if b is not None:
            b[: len(w)][rest] += direct[-1]
            if self.own.after:
                b[len(w) :][rest] += behind[-1]


def _behind(kind: str, size: int, sums: Floats, lack: Floats) -> Sample:
    """What lacks as the usual gates let it through, in units of their steepest slope.

    Sums far out, where a gate is open or shut whatever they are, would outweigh all others.
    """
    made = sums + lack
    passed = np.tanh(made) - np.tanh(sums)
    squeezed = 4 * (_sigmoid(made) - _sigmoid(sums))
    sigmoid = {"RNN": 0, "GRU": 2, "LSTM": 3}[kind] * size
    return np.concatenate([squeezed[:, :sigmoid], passed[:, sigmoid:]], 1).astype(np.float32)


def _around_reset(
    x: Floats, h: Floats, reset: Floats, lack: Floats, strength: float, steps: int = 60
) -> tuple[Array, Array]:
    """Ridge regression of `lack` on `x @ direct + reset * (h @ behind)`, by conjugate gradients (Hestenes 1952).

    Every unit has a system of its own, since its reset gate weighs h. Inputs are scaled to a mean square of one.
    """
    width = x.shape[1] + h.shape[1]
    if lack.shape[1] * len(x) * width**2 <= DIRECT:
        return _unit_by_unit(x, h, reset, lack, strength)
    sizes = [np.sqrt(np.maximum(np.square(each, dtype=np.float64).mean(0), 1e-12)) for each in (x, h)]
    x, h = x / sizes[0].astype(np.float32), h / sizes[1].astype(np.float32)
    ridge, count = strength * len(x), x.shape[1]

    def back(made: Floats) -> Array:
        return np.concatenate([x.T @ made, h.T @ (reset * made)]).astype(np.float64)

    def applied(change: Array) -> Array:
        part = change.astype(np.float32)
        return back(x @ part[:count] + reset * (h @ part[count:])) + ridge * change

    rest = back(lack)
    enough = NEAR * float(np.square(rest).sum())
    found, way, size = np.zeros_like(rest), rest, np.square(rest).sum(0)
    for _ in range(steps):
        image = applied(way)
        step = size / np.maximum((way * image).sum(0), 1e-30)
        found, rest = found + step * way, rest - step * image
        new = np.square(rest).sum(0)
        if float(new.sum()) < enough:
            break
        way, size = rest + new / np.maximum(size, 1e-30) * way, new
    return found[:count] / sizes[0][:, None], found[count:] / sizes[1][:, None]


def _unit_by_unit(x: Floats, h: Floats, reset: Floats, lack: Floats, strength: float) -> tuple[Array, Array]:
    """The same, solved directly for each unit."""
    found = []
    for unit in range(lack.shape[1]):
        system = Moments()
        system.add(np.concatenate([x, reset[:, unit, None] * h], 1)[None], lack[None, :, unit, None])
        found.append(system.solved(strength)[0, :, 0])
    both = np.stack(found, 1)
    return both[: x.shape[1]], both[x.shape[1] :]
