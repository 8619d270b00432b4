"""Recurrent layers over (seq, batch, input): the hidden units are one axis, repeated for every gate."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxprune.labels.flow import Flow, given, integer, rule
from onnxprune.labels.resizing import Cut, resize

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


@rule("RNN", "GRU", "LSTM")
def recurrent(flow: Flow, node: ir.Node) -> None:
    """`x[s,b,i], w[d,(g h),i], r[d,(g h),h], bias[d,(2 g h)], lengths, h0[d,b,h], c0[d,b,h], p[d,(3 h)] -> y[s,d,b,h]`.

    The directions d share their units, since they share the axis h of the output.
    """
    x, w, r = (flow.of(node.inputs[i]) for i in range(3))
    gates, size = GATES[node.op_type], integer(node, "hidden_size", 0)
    hidden = r[2] if len(r) == 3 else None
    if len(x) != 3 or len(w) != 3 or hidden is None or size != len(hidden):
        for value in node.inputs:
            flow.lock_all(flow.of(value), "the shapes of this recurrent layer are unknown")
        return
    stacked = np.tile(hidden, gates)
    flow.tie(x[2], w[2], "the input of this recurrent layer can't be cut")
    flow.lock_all((w[0], r[0], *x[:2]), "directions, time and batch stay")
    flow.tie(w[1], stacked)
    flow.tie(r[1], stacked)
    for index, vector in ((3, np.tile(hidden, 2 * gates)), (7, np.tile(hidden, 3))):
        if (parameter := given(node, index)) is not None:
            flow.lock(flow.of(parameter)[0], "directions stay")
            flow.tie(flow.of(parameter)[1], vector)
    for index in (5, 6):
        if (state := given(node, index)) is not None:
            flow.lock_all(flow.of(state)[:2], "directions and batch stay")
            flow.tie(flow.of(state)[2], hidden, "the initial state can't be cut")
    flow.kinds.append((hidden, "hidden"))
    flow.inexact(hidden)  # a mask on the output doesn't reach the recurrence inside
    for output in node.outputs:
        if output.name:
            flow.give(output, (None,) * (len(flow.shape(output) or (0, 0, 0)) - 1) + (hidden,))


@resize("RNN", "GRU", "LSTM")
def resize_hidden(cut: Cut, node: ir.Node) -> None:
    """`hidden_size` is an attribute."""
    node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", cut.size(node.inputs[2], 2))
