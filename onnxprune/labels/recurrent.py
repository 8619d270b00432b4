"""Recurrent layers over (seq, batch, input): the hidden units are one axis, repeated for every gate."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxprune.labels.flow import Flow, given, integer, operator_name, rule
from onnxprune.labels.resizing import Cut, resize

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


QUANTISED = "com.microsoft::DynamicQuantizeLSTM"


@rule("RNN", "GRU", "LSTM", QUANTISED)
def recurrent(flow: Flow, node: ir.Node) -> None:
    """`x[s,b,i], w[d,(g h),i], r[d,(g h),h], bias[d,(2 g h)], lengths, h0[d,b,h], c0[d,b,h], p[d,(3 h)] -> y[s,d,b,h]`.

    The directions d share their units, since they share the axis h of the output. The quantised one has `w[d,i,(g h)],
    r[d,h,(g h)]`, and scales and zero points `[d]` or `[d,(g h)]` of both.
    """
    x, w, r = (list(flow.of(node.inputs[i])) for i in range(3))
    turned = operator_name(node) == QUANTISED
    gates, size = 4 if turned else GATES[node.op_type], integer(node, "hidden_size", 0)
    if turned and len(w) == len(r) == 3:
        w[1:], r[1:] = w[:0:-1], r[:0:-1]
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
    for value in node.inputs[8:12]:
        flow.lock_all(flow.of(value)[:1], "directions stay")
        for scales in flow.of(value)[1:]:
            flow.tie(scales, stacked)
    for index in (5, 6):
        if (state := given(node, index)) is not None:
            flow.lock_all(flow.of(state)[:2], "directions and batch stay")
            flow.tie(flow.of(state)[2], hidden, "the initial state can't be cut")
    flow.kinds.append((hidden, "hidden"))
    flow.inexact(hidden)  # a mask on the output doesn't reach the recurrence inside
    for output in node.outputs:
        if output.name and (output.uses() or output.is_graph_output()):
            flow.give(output, (None,) * (len(flow.shape(output) or (0, 0, 0)) - 1) + (hidden,))


@resize("RNN", "GRU", "LSTM", QUANTISED)
def resize_hidden(cut: Cut, node: ir.Node) -> None:
    """`hidden_size` is an attribute."""
    size = cut.size(node.inputs[2], 1 if operator_name(node) == QUANTISED else 2)
    node.attributes["hidden_size"] = ir.AttrInt64("hidden_size", size)
