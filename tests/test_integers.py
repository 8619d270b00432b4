"""Operators that compute in integers are spelt out as pairs, compute the same, and are cut like floats."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnxprune.evaluating.data import random_inputs
from onnxprune.evaluating.evaluate import relative_difference, run_model
from onnxprune.labels import analyse
from onnxprune.labels.units import find_units
from onnxprune.normalising.normalise import normalise
from tests.graphs import check_oracle, proto

STEP = 1 / 255  # of the quantised output
NUMBERS = """<float s = {0.02}, uint8 z = {128}, float t = {0.05}, uint8 u = {120}, float ws = {0.01}, int8 wz = {0},
    float r = {0.1}, uint8 v = {130}"""
FIRST = "q = QuantizeLinear(x, s, z) h = QLinearConv(q, s, z, w, ws, wz, t, u, b)"
LAST = "y = DequantizeLinear(o, r, v) }"
IMAGE = """(float[N,3,6,6] x, int8[8,3,1,1] w, int32[8] b, int8[5,8,1,1] k MORE) => (float[N,5,A,B] y)"""


def case(middle: str, more: str = "", numbers: str = "") -> str:
    return f"{IMAGE.replace(' MORE', more)} {NUMBERS}{numbers}> {{ {FIRST} {middle} {LAST}"


CONV = "o = QLinearConv(HERE, t, u, k, ws, wz, r, v)"
CASES = {
    "convolutions": ([8], case(CONV.replace("HERE", "h"))),
    "pooled and moved as integers": ([8], case(f"""p = MaxPool<kernel_shape=[2,2]>(h)
        n = Transpose<perm=[0,1,3,2]>(p) {CONV.replace("HERE", "n")}""")),
    "sums, products and activations": ([8], case(f"""a = com.microsoft.QLinearSigmoid(h, t, u, t, u)
        c = com.microsoft.QLinearMul(h, t, u, a, t, u, t, u)
        d = com.microsoft.QLinearLeakyRelu<alpha=0.2>(c, t, u, t, u)
        e = com.microsoft.QLinearAdd(d, t, u, h, t, u, t, u) {CONV.replace("HERE", "e")}""")),
    "averages": ([8], case(f"""p = com.microsoft.QLinearAveragePool<kernel_shape=[2,2]>(h, t, u, t, u)
        g = com.microsoft.QLinearGlobalAveragePool(p, t, u, t, u) {CONV.replace("HERE", "g")}""")),
    "joined": ([8, 4], case("""g = QLinearConv(q, s, z, m, ws, wz, t, u)
        c = com.microsoft.QLinearConcat<axis=1>(t, u, g, t, u, h, t, u) o = QLinearConv(c, t, u, l, ws, wz, r, v)""",
        ", int8[4,3,1,1] m, int8[5,12,1,1] l")),
    "scales along channels": ([8], "(float[N,3,6,6] x, int8[8,3,1,1] w, float[8] ws, int8[8] wz, int32[8] b,"
        "int8[5,8,1,1] k) => (float[N,5,6,6] y) <float s = {0.02}, uint8 z = {128}, float t = {5.0}, uint8 u = {120},"
        "float r = {5.0}, uint8 v = {130}, float ks = {0.01}, int8 kz = {0}> { q = QuantizeLinear(x, s, z)"
        "h = QLinearConv(q, s, z, w, ws, wz, t, u, b) o = QLinearConv(h, t, u, k, ks, kz, r, v)"
        "y = DequantizeLinear(o, r, v) }"),
    "products": ([7], "(float[N,6] x, int8[6,7] w, int8[7,5] k) => (float[N,5] y)" + NUMBERS + "> {"
        "q = QuantizeLinear(x, s, z) h = QLinearMatMul(q, s, z, w, ws, wz, t, u)"
        "n = com.microsoft.QLinearSoftmax<axis=0, opset=13>(h, t, u, s, z)"
        "e = com.microsoft.QLinearMul(h, t, u, n, s, z, t, u) o = QLinearMatMul(e, t, u, k, ws, wz, r, v)" + LAST),
    "affine": ([7], "(float[N,6] x, int8[7,6] w, int32[7] b, int8[7,5] k) => (float[N,5] y)" + NUMBERS + "> {"
        "q = QuantizeLinear(x, s, z) h = com.microsoft.QGemm<transB=1>(q, s, z, w, ws, wz, b, t, u)"
        "y = com.microsoft.QGemm(h, t, u, k, ws, wz) }"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_spelt_out_equal_and_cut(name: str) -> None:
    sizes, text = CASES[name]
    model = ir.from_proto(proto(text))
    normal = normalise(model)
    assert not [node.op_type for node in normal.graph if node.op_type.startswith(("QLinear", "QGemm"))]
    for seed in range(3):
        inputs = random_inputs(model, seed, batch=4)
        before, after = run_model(model, inputs), run_model(normal, inputs)
        assert relative_difference(before, after) <= 2 * STEP
    units = check_oracle(normal)
    assert [len(group.units) for group in units.groups] == sizes


def test_what_is_not_understood_stays_and_locks() -> None:
    text = case(f"""p = Transpose<perm=[0,2,3,1]>(h)
    a = com.microsoft.QLinearGlobalAveragePool<channels_last=1>(p, t, u, t, u) n = Transpose<perm=[0,3,1,2]>(a)
    {CONV.replace("HERE", "n")}""")
    normal = normalise(ir.from_proto(proto(text)))
    assert [node.op_type for node in normal.graph if node.op_type.startswith("QLinear")] == ["QLinearGlobalAveragePool"]
    units = find_units(analyse(normal))
    assert not units.groups
    assert any("QLinearGlobalAveragePool" in lock.reason for lock in units.solution.lock_reasons().values())
