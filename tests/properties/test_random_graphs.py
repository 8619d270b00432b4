"""Random graphs, pruned at random: whatever the structure, an exact cut equals the masked model."""

from __future__ import annotations

import hypothesis
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxprune.cutting.cut import cut
from onnxprune.cutting.verify import mask_oracle
from onnxprune.labels import analyse
from onnxprune.labels.units import find_units
from tests.graphs import random_cut, shuffled


class Builder:
    """Grows a graph of (N, C, 4) tensors by operators drawn from Hypothesis."""

    def __init__(self, draw: st.DataObject) -> None:
        self.draw, self.nodes, self.initializers, self.count = draw, [], [], 0
        self.rng = np.random.default_rng(draw.draw(st.integers(0, 999)))
        self.values: dict[str, int] = {"x": 3}  # name -> channels

    def pick(self, strategy: st.SearchStrategy) -> object:
        return self.draw.draw(strategy)

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def constant(self, array: np.ndarray) -> str:
        name = self.name()
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape).astype(np.float32))

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def node(self, op: str, inputs: list[str], channels: int, **attributes: object) -> str:
        name = self.name()
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n{name}", **attributes))
        self.values[name] = channels
        return name

    def value(self) -> tuple[str, int]:
        name = self.pick(st.sampled_from(sorted(self.values)))
        return name, self.values[name]

    def grow(self) -> None:
        getattr(self, self.pick(st.sampled_from(OPERATIONS)))(*self.value())

    def conv(self, x: str, c: int) -> None:
        out = self.pick(st.sampled_from([2, 3, 4, 6]))
        self.node("Conv", [x, self.weight(out, c, 1), self.weight(out)], out)

    def grouped(self, x: str, c: int) -> None:
        groups = self.pick(st.sampled_from([g for g in (1, 2, 3) if c % g == 0]))
        out = groups * self.pick(st.sampled_from([1, 2, 3]))
        self.node("Conv", [x, self.weight(out, c // groups, 1)], out, group=groups)

    def depthwise(self, x: str, c: int) -> None:
        self.node("Conv", [x, self.weight(c, 1, 3)], c, group=c, pads=[1, 1])

    def linear(self, x: str, c: int) -> None:
        out = self.pick(st.sampled_from([2, 4, 6]))
        first = self.node("Transpose", [x], c, perm=[0, 2, 1])
        second = self.node("MatMul", [first, self.weight(c, out)], out)
        del self.values[first], self.values[second]
        self.node("Transpose", [second], out, perm=[0, 2, 1])

    def gemm(self, x: str, c: int) -> None:
        out = self.pick(st.sampled_from([2, 4]))
        flat = self.node("Reshape", [x, self.ints(-1, c * 4)], c)
        wide = self.node("Gemm", [flat, self.weight(c * 4, out * 4), self.weight(out * 4)], out)
        del self.values[flat], self.values[wide]
        self.node("Reshape", [wide, self.ints(-1, out, 4)], out)

    def unary(self, x: str, c: int) -> None:
        self.node(self.pick(st.sampled_from(["Relu", "Sigmoid", "Tanh", "Neg"])), [x], c)

    def scale(self, x: str, c: int) -> None:
        self.node(self.pick(st.sampled_from(["Add", "Mul"])), [self.weight(c, 1), x], c)

    def merge(self, x: str, c: int) -> None:
        others = [name for name, channels in sorted(self.values.items()) if channels == c]
        self.node(self.pick(st.sampled_from(["Add", "Mul", "Max"])), [x, self.pick(st.sampled_from(others))], c)

    def concat(self, x: str, c: int) -> None:
        other, d = self.value()
        if c + d <= 24:
            self.node("Concat", [x, other], c + d, axis=1)

    def slice(self, x: str, c: int) -> None:
        start = self.pick(st.integers(0, c - 1))
        end = self.pick(st.integers(start + 1, c))
        self.node("Slice", [x, self.ints(start), self.ints(end), self.ints(1)], end - start)

    def gather(self, x: str, c: int) -> None:
        index = self.pick(st.lists(st.integers(0, c - 1), min_size=1, max_size=6, unique=True))
        self.node("Gather", [x, self.ints(*index)], len(index), axis=1)

    def shuffle(self, x: str, c: int) -> None:
        groups = self.pick(st.sampled_from([g for g in (1, 2, 3) if c % g == 0]))
        a = self.node("Reshape", [x, self.ints(0, groups, c // groups, 4)], c)
        b = self.node("Transpose", [a], c, perm=[0, 2, 1, 3])
        del self.values[a], self.values[b]
        self.node("Reshape", [b, self.ints(0, c, 4)], c)

    def pad(self, x: str, c: int) -> None:
        front, back = self.pick(st.integers(0, 2)), self.pick(st.integers(0, 2))
        self.node("Pad", [x, self.ints(0, front, 0, 0, back, 0)], c + front + back)

    def split(self, x: str, c: int) -> None:
        if c < 2:
            return
        first = self.pick(st.integers(1, c - 1))
        names = [self.name(), self.name()]
        sizes = self.ints(first, c - first)
        self.nodes.append(helper.make_node("Split", [x, sizes], names, name=f"n{names[0]}", axis=1))
        self.values |= {names[0]: first, names[1]: c - first}

    def model(self) -> ir.Model:
        used = {name for node in self.nodes for name in node.input}
        ends = [name for name in self.values if name not in used] or [list(self.values)[-1]]
        outs = []
        for name in ends:  # every loose end is read by a convolution, so that its channels aren't outputs
            outs.append(self.node("Conv", [name, self.weight(2, self.values[name], 1)], 2))
        info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 2, 4]) for name in outs]
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 4])
        graph = helper.make_graph(self.nodes, "random", [x], info, self.initializers)
        return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


OPERATIONS = [
    "conv", "conv", "conv", "grouped", "depthwise", "linear", "unary", "scale", "merge", "concat", "slice", "gather",
    "shuffle", "pad", "split", "gemm",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_a_random_cut_of_a_random_graph_equals_the_masked_model(seed: int) -> None:
    @hypothesis.seed(seed)
    @settings(max_examples=350, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        check_random_graph(data)

    holds()


def check_random_graph(data: st.DataObject) -> None:
    builder = Builder(data)
    for _ in range(data.draw(st.integers(2, 12))):
        builder.grow()
    model = builder.model()
    granularity = data.draw(st.sampled_from(["auto", "rows", "columns"]))
    model = shuffled(model, granularity)
    units = find_units(analyse(model, granularity))
    pruned, plan = cut(units, random_cut(units, builder.rng, data.draw(st.sampled_from([0.3, 0.6, 0.9]))))
    result = mask_oracle(model, pruned, plan, seeds=(0,))
    neighbours = {node.name for node in model.graph if node.attributes.get("pads") is not None}
    if not set(result.open_nodes) & neighbours:  # a convolution along what were channels before a Gemm
        assert plan.exact
        assert result.difference <= 1e-4
