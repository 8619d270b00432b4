"""Recurrent layers, unrolled over their length: gradient kernels want inputs that exporters leave out."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import onnx_ir as ir

from onnxprune.graph.model import constant
from onnxprune.labels.flow import integer
from onnxprune.labels.recurrent import GATES
from onnxprune.training.lowering.base import Lowerer, lowering

USUAL = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
KNOWN = {name.lower(): name for name in ("Sigmoid", "Tanh", "Relu")}


@lowering("RNN", "GRU", "LSTM")
def _recurrent(lower: Lowerer, node: ir.Node) -> None:
    """The outputs Y (length, directions, batch, hidden), Y_h and, for LSTM, Y_c (directions, batch, hidden)."""
    x = node.inputs[0]
    assert x is not None
    if unsupported := _unsupported(lower, node, x):
        raise lower.refusal(node, unsupported)
    kind = node.attributes["direction"].as_string() if "direction" in node.attributes else "forward"
    directions = [Direction(lower, node, i, back) for i, back in enumerate(DIRECTIONS[kind])]
    runs = [direction.run() for direction in directions]

    def every_state() -> list[ir.Value]:
        return [_joined(lower, node, [_lifted(lower, node, h, 0, 1) for h in states], 0) for states, _ in runs]

    def last_state() -> list[ir.Value]:
        return [_lifted(lower, node, d.last(states), 0) for d, (states, _) in zip(directions, runs, strict=True)]

    def last_cell() -> list[ir.Value]:
        return [_lifted(lower, node, cell, 0) for _, cell in runs if cell is not None]

    for output, (parts, axis) in zip(node.outputs, ((every_state, 1), (last_state, 0), (last_cell, 0)), strict=False):
        if output.uses() or output.is_graph_output():
            value = _joined(lower, node, parts(), axis)
            output.replace_all_uses_with(value, replace_graph_outputs=True)
            value.type, value.shape, value.name, output.name = output.type, output.shape, output.name, None
    lower.model.graph.remove(node, safe=True)


DIRECTIONS = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}


def _unsupported(lower: Lowerer, node: ir.Node, x: ir.Value) -> str:
    """Why a layer can't be unrolled; nothing if it can."""
    length = lower.sizes(node, x)[0]
    given = [*node.inputs, None, None, None, None][:8]
    lengths = constant(given[4]) if given[4] is not None else np.array([length])
    if lengths is None or (lengths != length).any():
        return "its sequences have lengths of their own"
    if any(name in node.attributes for name in ("clip", "activation_alpha", "activation_beta")):
        return "its activations have parameters"
    if len(node.inputs) > 7 and node.inputs[7] is not None:
        return "it has peepholes"
    if integer(node, "layout", 0) or integer(node, "input_forget", 0):
        return "of its layout, or of coupled gates"
    names = node.attributes["activations"].as_strings() if "activations" in node.attributes else []
    return "" if all(name.lower() in KNOWN for name in names) else "of its activations"


def _lifted(lower: Lowerer, node: ir.Node, value: ir.Value, *axes: int) -> ir.Value:
    return lower.add(node, "Unsqueeze", [value, lower.integers(node, *axes)])


def _joined(lower: Lowerer, node: ir.Node, values: list[ir.Value], axis: int) -> ir.Value:
    return lower.add(node, "Concat", values, axis=axis) if len(values) > 1 else values[0]


class Direction:
    """One direction of a layer, as in the ONNX standard:

    RNN: h' = f(Wx + Rh + b). GRU: z = f(..), r = f(..), n = g(Wx + b + r (Rh + c)) or g(Wx + b + R (r h) + c),
    h' = (1 - z) n + z h. LSTM: i, o, f = f(..), c' = f c + i g(..), h' = o h(c').
    """

    def __init__(self, lower: Lowerer, node: ir.Node, index: int, backwards: bool) -> None:
        self.lower, self.node, self.index, self.backwards = lower, node, index, backwards
        self.hidden, self.gates = integer(node, "hidden_size", 0), GATES[node.op_type]
        self.length, self.batch = lower.sizes(node, node.inputs[0])[:2]
        usual = USUAL[node.op_type]
        named = node.attributes["activations"].as_strings() if "activations" in node.attributes else usual
        named = [*named, *usual][index * len(usual) :] if len(named) > len(usual) else named
        self.activations = [KNOWN[name.lower()] for name in named[: len(usual)]]

    def run(self) -> tuple[list[ir.Value], ir.Value | None]:
        """The state after each step, in the order of the positions, and the last cell of an LSTM."""
        h, c = self._state(5), self._state(6) if self.node.op_type == "LSTM" else None
        states: list[ir.Value] = []
        for step in reversed(self.steps) if self.backwards else self.steps:
            if self.node.op_type == "RNN":
                h = self._act(0, self._add("Add", step, self._recurrent(h)))
            elif self.node.op_type == "GRU":
                h = self._gru(step, h)
            else:
                assert c is not None
                h, c = self._lstm(step, h, c)
            states.append(h)
        return states[::-1] if self.backwards else states, c

    def last(self, states: list[ir.Value]) -> ir.Value:
        """The state after the last step taken."""
        return states[0] if self.backwards else states[-1]

    @cached_property
    def steps(self) -> list[ir.Value]:
        """What the inputs contribute to the gates, (batch, gates x hidden), by position."""
        x = self.node.inputs[0]
        assert x is not None
        products = self._add("MatMul", x, self._transposed(1))
        if (bias := self.biases[0]) is not None:
            products = self._add("Add", products, bias)
        parts = self._split(products, 0, [1] * self.length)
        return [self.lower.add(self.node, "Squeeze", [part, self.lower.integers(self.node, 0)]) for part in parts]

    @cached_property
    def biases(self) -> tuple[ir.Value | None, ir.Value | None]:
        """The biases of the inputs and of the state, (gates x hidden)."""
        if len(self.node.inputs) < 4 or self.node.inputs[3] is None:
            return None, None
        both = self._split(self._own(3), 0, [self.gates * self.hidden] * 2)
        return both[0], both[1]

    @cached_property
    def matrix(self) -> ir.Value:
        """What the state is multiplied by, (hidden, gates x hidden)."""
        return self._transposed(2)

    @cached_property
    def candidate(self) -> tuple[ir.Value, ir.Value | None, ir.Value, ir.Value | None]:
        """A GRU's matrix and bias for both gates, and for the candidate."""
        sizes = [2 * self.hidden, self.hidden]
        matrices = self._split(self.matrix, 1, sizes)
        biases = self._split(self.biases[1], 0, sizes) if self.biases[1] is not None else [None, None]
        return matrices[0], biases[0], matrices[1], biases[1]

    def _recurrent(self, h: ir.Value) -> ir.Value:
        product = self._add("MatMul", h, self.matrix)
        return product if self.biases[1] is None else self._add("Add", product, self.biases[1])

    def _gru(self, step: ir.Value, h: ir.Value) -> ir.Value:
        gate_matrix, gate_bias, matrix, bias = self.candidate
        both, new = self._split(step, 1, [2 * self.hidden, self.hidden])
        both = self._add("Add", both, self._plus(self._add("MatMul", h, gate_matrix), gate_bias))
        z, r = self._split(self._act(0, both), 1, [self.hidden] * 2)
        if integer(self.node, "linear_before_reset", 0):
            inner = self._add("Mul", r, self._plus(self._add("MatMul", h, matrix), bias))
        else:
            inner = self._plus(self._add("MatMul", self._add("Mul", r, h), matrix), bias)
        n = self._act(1, self._add("Add", new, inner))
        return self._add("Add", n, self._add("Mul", z, self._add("Sub", h, n)))

    def _lstm(self, step: ir.Value, h: ir.Value, c: ir.Value) -> tuple[ir.Value, ir.Value]:
        all_gates, candidate = self._split(
            self._add("Add", step, self._recurrent(h)), 1, [3 * self.hidden, self.hidden]
        )
        i, o, f = self._split(self._act(0, all_gates), 1, [self.hidden] * 3)
        kept, new = self._add("Mul", f, c), self._add("Mul", i, self._act(1, candidate))
        c = self._add("Add", kept, new)
        return self._add("Mul", o, self._act(2, c)), c

    def _act(self, which: int, value: ir.Value) -> ir.Value:
        return self.lower.add(self.node, self.activations[which], [value])

    def _add(self, op: str, a: ir.Value, b: ir.Value) -> ir.Value:
        return self.lower.add(self.node, op, [a, b])

    def _plus(self, value: ir.Value, bias: ir.Value | None) -> ir.Value:
        return value if bias is None else self._add("Add", value, bias)

    def _split(self, value: ir.Value, axis: int, sizes: list[int]) -> list[ir.Value]:
        if len(sizes) == 1:
            return [value]
        return self.lower.add_all(
            self.node, "Split", [value, self.lower.integers(self.node, *sizes)], len(sizes), axis=axis
        )

    def _own(self, position: int) -> ir.Value:
        """This direction's part of an input."""
        value = self.node.inputs[position]
        assert value is not None
        index = self.lower.constant(self.node, np.array(self.index, np.int64))
        return self.lower.add(self.node, "Gather", [value, index], axis=0)

    def _transposed(self, position: int) -> ir.Value:
        return self.lower.add(self.node, "Transpose", [self._own(position)], perm=[1, 0])

    def _state(self, position: int) -> ir.Value:
        if len(self.node.inputs) > position and self.node.inputs[position] is not None:
            return self._own(position)
        return self.lower.constant(self.node, np.zeros((self.batch, self.hidden), np.float32))
