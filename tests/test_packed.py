"""Packed projections: what one product makes for queries, keys and values is split before it is reshaped."""

from __future__ import annotations

import pytest

from onnxprune.labels import analyse
from onnxprune.labels.units import find_units
from tests.graphs import check_oracle, graph

ATTEND = """a = MatMul(q, kt) z = Softmax(a) c = MatMul(z, v) d = Transpose<perm=[0,2,1,3]>(c) e = Reshape(d, join)
y = MatMul(e, o) }"""
HEAD = "(float[N,4,6] x, float[6,36] w, float[36] b, float[12,5] o) => (float[N,4,5] y)"
NUMBERS = "int64[3] join = {0,4,12}, int64 zero = {0}, int64 one = {1}, int64 two = {2}"
PICK = """q = Gather<axis=0>(t, zero) k = Gather<axis=0>(t, one) v = Gather<axis=0>(t, two)
kt = Transpose<perm=[0,1,3,2]>(k)"""

PACKED = {
    "parts before heads": f"""{HEAD} <int64[5] split = {{0,4,3,3,4}}, {NUMBERS}> {{ m = MatMul(x, w) p = Add(m, b)
        s = Reshape(p, split) t = Transpose<perm=[2,0,3,1,4]>(s) {PICK} {ATTEND}""",
    "heads before parts": f"""{HEAD} <int64[5] split = {{0,4,3,3,4}}, {NUMBERS}> {{ m = MatMul(x, w) p = Add(m, b)
        s = Reshape(p, split) t = Transpose<perm=[3,0,2,1,4]>(s) {PICK} {ATTEND}""",
    "by a split": f"""{HEAD} <int64[5] split = {{0,4,3,3,4}}, {NUMBERS}, int64[3] ones = {{1,1,1}},
        int64[1] first = {{0}}> {{ m = MatMul(x, w) p = Add(m, b) s = Reshape(p, split)
        t = Transpose<perm=[2,0,3,1,4]>(s)
        q0, k0, v0 = Split<axis=0>(t, ones) q = Squeeze(q0, first) k = Squeeze(k0, first) v = Squeeze(v0, first)
        kt = Transpose<perm=[0,1,3,2]>(k) {ATTEND}""",
    "through axes of one": f"""{HEAD} <int64[4] split = {{0,4,3,12}}, int64[4] heads = {{0,4,3,4}}, {NUMBERS},
        int64[1] first = {{0}}, int64[1] minus = {{-2}}> {{ m = MatMul(x, w) p = Add(m, b) s = Reshape(p, split)
        u = Unsqueeze(s, first) r = Transpose<perm=[3,1,2,0,4]>(u) t = Squeeze(r, minus)
        q0 = Gather<axis=0>(t, zero) k0 = Gather<axis=0>(t, one) v0 = Gather<axis=0>(t, two)
        q1 = Reshape(q0, heads) k1 = Reshape(k0, heads) v1 = Reshape(v0, heads) q = Transpose<perm=[0,2,1,3]>(q1)
        kt = Transpose<perm=[0,2,3,1]>(k1) v = Transpose<perm=[0,2,1,3]>(v1) {ATTEND}""",
}


def kinds(text: str, granularity: str) -> list[tuple[str, int]]:
    units = find_units(analyse(graph(text), granularity))  # type: ignore[arg-type]
    return [(group.kind, len(group.units)) for group in units.groups]


@pytest.mark.parametrize("name", [name for name in PACKED if name != "heads before parts"])
def test_queries_and_values_are_cut_apart(name: str) -> None:
    assert kinds(PACKED[name], "auto") == [("head", 3)]
    assert kinds(PACKED[name], "columns") == [("qk", 4), ("value", 4)]
    for granularity in ("rows", "columns"):
        check_oracle(graph(PACKED[name]), granularity=granularity)


def test_parts_that_lie_inside_of_heads_stay_together() -> None:
    assert not any(node.op_type == "Split" for node in graph(PACKED["heads before parts"]).graph)
    check_oracle(graph(PACKED["heads before parts"]))


@pytest.mark.parametrize(
    "change",
    [
        ("y = MatMul(e, o)", "n = Shape(s) j = MatMul(e, o) f = Cast<to=1>(n) g = ReduceSum<keepdims=0>(f)"
         "y = Add(j, g)"),
        ("kt = Transpose<perm=[0,1,3,2]>(k)", "h = Add(k, k) r = ReduceMax<keepdims=0>(t) i = Add(h, r)"
         "kt = Transpose<perm=[0,1,3,2]>(i)"),
    ],
)  # fmt: skip
def test_what_is_read_whole_stays_whole(change: tuple[str, str]) -> None:
    text = PACKED["parts before heads"].replace(*change)
    assert text != PACKED["parts before heads"]
    assert not any(node.op_type == "Split" for node in graph(text).graph)
    check_oracle(graph(text))
