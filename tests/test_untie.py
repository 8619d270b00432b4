"""States, masks and position biases tie no layers, and what is picked from a Concat ties only what is picked."""

from __future__ import annotations

import pytest

from onnxprune.exporting.finalise import join_copies
from onnxprune.labels.units import Units
from tests.graphs import check_oracle, graph

HEADS = """
    q{i} = MatMul(x{i}, wq{i}) k{i} = MatMul(x{i}, wk{i}) v{i} = MatMul(x{i}, wv{i})
    q{i}r = Reshape(q{i}, split) k{i}r = Reshape(k{i}, split) v{i}r = Reshape(v{i}, split)
    q{i}t = Transpose<perm=[0,2,1,3]>(q{i}r) k{i}t = Transpose<perm=[0,2,3,1]>(k{i}r)
    v{i}t = Transpose<perm=[0,2,1,3]>(v{i}r) s{i} = MatMul(q{i}t, k{i}t) b{i} = Add(s{i}, bias)
    a{i} = Softmax(b{i}) c{i} = MatMul(a{i}, v{i}t) d{i} = Transpose<perm=[0,2,1,3]>(c{i}) e{i} = Reshape(d{i}, join)
    o{i} = MatMul(e{i}, wo{i}) x{j} = Add(x{i}, o{i})
"""
WEIGHTS = ", ".join(f"float[12,12] w{p}{i}" for p in "qkvo" for i in range(2))
TWO = "\n".join(HEADS.format(i=i, j=i + 1) for i in range(2))
ATTENTION = f"""(float[N,T,12] x0, {WEIGHTS}, float[12,5] out, EXTRA) => (float[N,T,5] y)
    <int64[4] split = {{0,0,4,3}}, int64[3] join = {{0,0,12}}, int64 one = {{1}}, int64 zero = {{0}},
    int64[1] first = {{0}},
    int64[1] second = {{1}}> {{ BIAS {TWO} y = MatMul(x2, out) }}"""
DISTANCE = """sh = Shape(x0) t = Gather<axis=0>(sh, one) p = Range(zero, t, one) f = Cast<to=1>(p)
    r = Unsqueeze(f, first) col = Unsqueeze(f, second) gap = Sub(r, col)"""
BIASES = {
    "slopes times distances": ("float[4,1,1] slopes", f"{DISTANCE} bias = Mul(slopes, gap)"),
    "a table of positions": (
        "float[64,4] table",
        f"{DISTANCE} whole = Cast<to=7>(gap) n = Abs(whole) g = Gather(table, n) bias = Transpose<perm=[2,0,1]>(g)",
    ),
}
STATES = """(float[T,N,6] x, float[1,32,6] w1, float[1,32,8] r1, float[1,32,8] w2, float[1,32,8] r2, float[8,5] out)
    => (float[M,5] y) <int64 one = {1}, int64[1] first = {0}, int64[1] two = {2}, int64[1] width = {8},
    int64[1] axis = {1},
    int64[1] end = {2}, int64[1] begin = {1}, int64 last = {-1}> {
    sh = Shape(x) n = Gather<axis=0>(sh, one) m = Unsqueeze(n, first) dims = Concat<axis=0>(two, m, width)
    zeros = ConstantOfShape(dims) s1 = Slice(zeros, first, begin, first) s2 = Slice(zeros, begin, end, first)
    a, h1, c1 = LSTM<hidden_size=8>(x, w1, r1, , , s1, s1) z = Squeeze(a, axis)
    b, h2, c2 = LSTM<hidden_size=8>(z, w2, r2, , , s2, s2)
    all = Concat<axis=0>(h1, h2) top = Gather<axis=0>(all, last) y = MatMul(top, out) }"""


def owners(units: Units, names: set[str]) -> list[set[str]]:
    """Which of these parameters each group cuts."""
    found = [names & set(group.members) for group in units.groups if len(group.units) > 1]
    return sorted((each for each in found if each), key=sorted)


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_a_position_bias_ties_no_heads(bias: tuple[str, str]) -> None:
    model = graph(ATTENTION.replace("EXTRA", bias[0]).replace("BIAS", bias[1]), inputs=("x0",))
    units = check_oracle(model)
    heads = [group for group in units.groups if group.kind == "head"]
    assert [len(group.units) for group in heads] == [4, 4]
    assert [{"wo0", "wo1"} & set(group.members) for group in heads] == [{"wo0"}, {"wo1"}]


def test_a_zero_state_and_a_pick_from_a_join_tie_no_layers() -> None:
    units = check_oracle(graph(STATES))
    assert owners(units, {"r1", "r2"}) == [{"r1"}, {"r2"}]


def test_copies_that_are_equal_are_joined_again() -> None:
    bias = BIASES["slopes times distances"]
    model = graph(ATTENTION.replace("EXTRA", bias[0]).replace("BIAS", bias[1]), inputs=("x0",))
    assert sum(node.op_type == "Range" for node in model.graph) == 2
    join_copies(model)
    assert sum(node.op_type == "Range" for node in model.graph) == 1
    assert (
        sum(
            value.const_value is not None and value.const_value.size == 4 for value in model.graph.initializers.values()
        )
        <= 3
    )


def test_a_mask_that_ties_nothing_is_not_copied() -> None:
    mask = "m = Unsqueeze(seen, first) n = Cast<to=1>(m) bias = Mul(n, low)"
    text = ATTENTION.replace("EXTRA", "int64[1,1,T] seen, float low").replace("BIAS", mask)
    model = graph(text, inputs=("x0", "seen"))
    assert sum(node.op_type == "Unsqueeze" for node in model.graph) == 1


def test_fills_are_no_parameters() -> None:
    units = check_oracle(graph(STATES))
    filled = {value.name for value in units.model.graph.initializers.values() if value.name and "fill" in value.name}
    assert len(filled) == 2
    assert not filled & {value.name for value, _, _ in units.parameters}
    assert not filled & {name for group in units.groups for name in group.members}
