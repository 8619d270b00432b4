"""Every rule on a small graph: how many units it finds, and that a random cut equals the masked model."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from onnxprune.labels import analyse
from onnxprune.labels.flow import RULES, Flow
from onnxprune.labels.locked import LOCKED as LOCKED_OPERATORS
from onnxprune.labels.units import find_units
from tests.graphs import check_oracle, graph, proto

# name: (units of each group, exact, graph)
EXACT = {
    "conv": ([8], "(float[N,3,6,6] x, float[8,3,3,3] w, float[8] b, float[5,8,1,1] v) => (float[N,5,6,6] y)"
        "{ h = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(h) y = Conv(r, v) }"),
    "conv 1d": ([8], "(float[N,3,9] x, float[8,3,3] w, float[5,8,1] v) => (float[N,5,7] y)"
        "{ h = Conv(x, w) y = Conv(h, v) }"),
    "conv 3d": ([4], "(float[N,2,4,4,4] x, float[4,2,1,1,1] w, float[3,4,1,1,1] v) => (float[N,3,4,4,4] y)"
        "{ h = Conv(x, w) y = Conv(h, v) }"),
    "depthwise": ([8], "(float[N,3,6,6] x, float[8,3,1,1] w, float[8,1,3,3] d, float[8] b, float[5,8,1,1] v)"
        "=> (float[N,5,4,4] y) { h = Conv(x, w) e = Conv<group=8>(h, d, b) s = Sigmoid(e) y = Conv(s, v) }"),
    "depthwise with a multiplier": ([4], "(float[N,3,6,6] x, float[4,3,1,1] w, float[8,1,3,3] d, float[5,8,1,1] v)"
        "=> (float[N,5,4,4] y) { h = Conv(x, w) e = Conv<group=4>(h, d) y = Conv(e, v) }"),
    "grouped": ([4, 6], "(float[N,3,6,6] x, float[8,3,1,1] w, float[12,4,3,3] g, float[5,12,1,1] v)"
        "=> (float[N,5,4,4] y) { h = Conv(x, w) e = Conv<group=2>(h, g) y = Conv(e, v) }"),
    "transposed": ([6, 4], "(float[N,3,6,6] x, float[6,3,1,1] w, float[6,4,2,2] t, float[4] b, float[5,4,1,1] v)"
        "=> (float[N,5,12,12] y) { h = Conv(x, w) e = ConvTranspose<strides=[2,2]>(h, t, b) y = Conv(e, v) }"),
    "transposed depthwise": ([6], "(float[N,3,6,6] x, float[6,3,1,1] w, float[6,1,2,2] t, float[5,6,1,1] v)"
        "=> (float[N,5,12,12] y) { h = Conv(x, w) e = ConvTranspose<strides=[2,2], group=6>(h, t) y = Conv(e, v) }"),
    "transposed grouped": ([3], "(float[N,3,6,6] x, float[8,3,1,1] w, float[8,3,2,2] t, float[5,6,1,1] v)"
        "=> (float[N,5,12,12] y) { h = Conv(x, w) e = ConvTranspose<strides=[2,2], group=2>(h, t) y = Conv(e, v) }"),
    "batch norm": ([8], "(float[N,3,6,6] x, float[8,3,3,3] w, float[8] s, float[8] b, float[8] m, float[8] var,"
        "float[5,8,1,1] v) => (float[N,5,4,4] y) { h = Conv(x, w) n = BatchNormalization(h, s, b, m, var)"
        "r = LeakyRelu(n) y = Conv(r, v) }"),
    "instance norm": ([8], "(float[N,3,6,6] x, float[8,3,3,3] w, float[8] s, float[8] b, float[5,8,1,1] v)"
        "=> (float[N,5,4,4] y) { h = Conv(x, w) n = InstanceNormalization(h, s, b) y = Conv(n, v) }"),
    "residual": ([8, 6], "(float[N,3,6,6] x, float[8,3,1,1] w, float[6,8,3,3] a, float[8,6,3,3] b, float[5,8,1,1] v)"
        "=> (float[N,5,6,6] y) { h = Conv(x, w) p = Conv<pads=[1,1,1,1]>(h, a) q = Relu(p)"
        "r = Conv<pads=[1,1,1,1]>(q, b) s = Add(h, r) y = Conv(s, v) }"),
    "squeeze and excite": ([8, 4], "(float[N,3,6,6] x, float[8,3,1,1] w, float[4,8,1,1] a, float[8,4,1,1] b,"
        "float[5,8,1,1] v) => (float[N,5,6,6] y) { h = Conv(x, w) g = GlobalAveragePool(h) p = Conv(g, a)"
        "q = Relu(p) r = Conv(q, b) s = HardSigmoid(r) m = Mul(h, s) y = Conv(m, v) }"),
    "concat": ([4, 6], "(float[N,3,6,6] x, float[4,3,1,1] a, float[6,3,1,1] b, float[5,10,1,1] v)"
        "=> (float[N,5,6,6] y) { p = Conv(x, a) q = Conv(x, b) c = Concat<axis=1>(p, q) y = Conv(c, v) }"),
    "concat of a tensor with itself": ([4], "(float[N,3,6,6] x, float[4,3,1,1] a, float[5,8,1,1] v)"
        "=> (float[N,5,6,6] y) { p = Conv(x, a) c = Concat<axis=1>(p, p) y = Conv(c, v) }"),
    "concat with the input": ([4], "(float[N,3,6,6] x, float[4,3,1,1] a, float[5,7,1,1] v)"
        "=> (float[N,5,6,6] y) { p = Conv(x, a) c = Concat<axis=1>(p, x) y = Conv(c, v) }"),
    "split": ([3, 5], "(float[N,3,6,6] x, float[8,3,1,1] a, float[5,5,1,1] v, float[5,3,1,1] u)"
        "=> (float[N,5,6,6] y) <int64[2] sizes = {3, 5}> { p = Conv(x, a) l, r = Split<axis=1>(p, sizes)"
        "s = Conv(l, u) t = Conv(r, v) y = Add(s, t) }"),
    "chunks that are added": ([4], "(float[N,3,6,6] x, float[8,3,1,1] a, float[5,4,1,1] v) => (float[N,5,6,6] y)"
        "{ p = Conv(x, a) l, r = Split<axis=1, num_outputs=2>(p) s = Add(l, r) y = Conv(s, v) }"),
    "slice": ([2, 6], "(float[N,3,6,6] x, float[8,3,1,1] a, float[5,6,1,1] v, float[5,8,1,1] u) => (float[N,5,6,6] y)"
        "<int64[1] start = {2}, int64[1] end = {9223372036854775807}, int64[1] axes = {1}>"
        "{ p = Conv(x, a) s = Slice(p, start, end, axes) t = Conv(s, v) w = Conv(p, u) y = Add(t, w) }"),
    "pad channels": ([4, 5], "(float[N,3,6,6] x, float[4,3,1,1] a, float[9,3,1,1] b, float[5,9,1,1] v)"
        "=> (float[N,5,6,6] y) <int64[8] pads = {0,3,0,0,0,2,0,0}> { p = Conv(x, a) q = Pad(p, pads) r = Conv(x, b)"
        "s = Add(q, r) y = Conv(s, v) }"),
    "flatten to gemm": ([4], "(float[N,3,3,3] x, float[4,3,1,1] w, float[36,5] f, float[5] c) => (float[N,5] y)"
        "{ h = Conv(x, w) z = Flatten(h) y = Gemm(z, f, c) }"),
    "gemm to convolution": ([4], "(float[N,6] x, float[6,36] f, float[5,4,3,3] v) => (float[N,5,1,1] y)"
        "<int64[4] target = {-1,4,3,3}> { z = Gemm(x, f) h = Reshape(z, target) y = Conv(h, v) }"),
    "gemm transposed": ([7], "(float[N,6] x, float[7,6] f, float[7] b, float[5,7] g) => (float[N,5] y)"
        "{ h = Gemm<transB=1>(x, f, b) r = Tanh(h) y = Gemm<transB=1>(r, g) }"),
    "matmul and bias": ([7], "(float[N,4,6] x, float[6,7] f, float[7] b, float[7,5] g) => (float[N,4,5] y)"
        "{ h = MatMul(x, f) s = Add(b, h) y = MatMul(s, g) }"),
    "matmul with the weight on the left": ([7], "(float[N,6,4] x, float[7,6] f, float[5,7] g) => (float[N,5,4] y)"
        "{ h = MatMul(f, x) r = Relu(h) y = MatMul(g, r) }"),
    "mixing over tokens": ([8, 6], "(float[N,4,3] x, float[3,8] a, float[4,6] t, float[6,4] u, float[8,5] b)"
        "=> (float[N,4,5] y) { h = MatMul(x, a) p = Transpose<perm=[0,2,1]>(h) q = MatMul(p, t) r = Relu(q)"
        "s = MatMul(r, u) z = Transpose<perm=[0,2,1]>(s) y = MatMul(z, b) }"),
    "gated": ([8], "(float[N,6] x, float[6,8] a, float[6,8] b, float[8,5] c) => (float[N,5] y)"
        "{ p = MatMul(x, a) s = Sigmoid(p) q = MatMul(x, b) m = Mul(s, q) y = MatMul(m, c) }"),
    "channel shuffle": ([6], "(float[N,3,4,4] x, float[12,3,1,1] w, float[5,12,1,1] v) => (float[N,5,4,4] y)"
        "<int64[5] split = {0,2,6,4,4}, int64[4] join = {0,12,4,4}> { h = Conv(x, w) a = Reshape(h, split)"
        "b = Transpose<perm=[0,2,1,3,4]>(a) c = Reshape(b, join) y = Conv(c, v) }"),
    "transpose to channels last": ([8], "(float[N,3,4,4] x, float[8,3,1,1] w, float[8,5] f) => (float[N,4,4,5] y)"
        "{ h = Conv(x, w) t = Transpose<perm=[0,2,3,1]>(h) y = MatMul(t, f) }"),
    "squeeze": ([8], "(float[N,3,4,4] x, float[8,3,1,1] w, float[8,5] f) => (float[N,5] y) <int64[2] axes = {2,3}>"
        "{ h = Conv(x, w) g = GlobalMaxPool(h) s = Squeeze(g, axes) y = MatMul(s, f) }"),
    "unsqueeze": ([8], "(float[N,6] x, float[6,8] f, float[5,8,1,1] v) => (float[N,5,1,1] y) <int64[2] axes = {2,3}>"
        "{ h = MatMul(x, f) u = Unsqueeze(h, axes) y = Conv(u, v) }"),
    "gather by constants": ([4, 2], "(float[N,6] x, float[6,6] f, float[4,5] g, float[6,5] k) => (float[N,5] y)"
        "<int64[4] index = {5,0,3,1}> { h = MatMul(x, f) p = Gather<axis=1>(h, index) q = MatMul(p, g)"
        "r = MatMul(h, k) y = Add(q, r) }"),
    "embedding": ([8], "(int64[N,4] x, float[9,8] table, float[8,5] g) => (float[N,4,5] y)"
        "{ h = Gather(table, x) y = MatMul(h, g) }"),
    "reduce sum over channels": ([8], "(float[N,6] x, float[6,8] f) => (float[N,1] y) <int64[1] axes = {1}>"
        "{ h = MatMul(x, f) r = Relu(h) y = ReduceSum<keepdims=1>(r, axes) }"),
    "reduce mean over space": ([8], "(float[N,3,4,4] x, float[8,3,1,1] w, float[8,5] f) => (float[N,5] y)"
        "<int64[2] axes = {2,3}> { h = Conv(x, w) m = ReduceMean<keepdims=0>(h, axes) y = MatMul(m, f) }"),
    "resize": ([8], "(float[N,3,4,4] x, float[8,3,1,1] w, float[5,8,1,1] v) => (float[N,5,8,8] y)"
        "<float[4] scales = {1,1,2,2}> { h = Conv(x, w) u = Resize<mode=\"nearest\">(h, , scales) y = Conv(u, v) }"),
    "resize to sizes": ([8], "(float[2,3,4,4] x, float[8,3,1,1] w, float[5,8,1,1] v) => (float[2,5,8,8] y)"
        "<int64[4] sizes = {2,8,8,8}> { h = Conv(x, w) u = Resize<mode=\"nearest\">(h, , , sizes) y = Conv(u, v) }"),
    "pixel shuffle": ([3], "(float[N,3,4,4] x, float[12,3,1,1] w, float[5,3,1,1] v) => (float[N,5,8,8] y)"
        "{ h = Conv(x, w) u = DepthToSpace<blocksize=2, mode=\"CRD\">(h) y = Conv(u, v) }"),
    "pixel shuffle, depth first": ([3], "(float[N,3,4,4] x, float[12,3,1,1] w, float[5,3,1,1] v)"
        "=> (float[N,5,8,8] y) { h = Conv(x, w) u = DepthToSpace<blocksize=2>(h) y = Conv(u, v) }"),
    "space to depth": ([3], "(float[N,3,4,4] x, float[3,3,1,1] w, float[5,12,1,1] v) => (float[N,5,2,2] y)"
        "{ h = Conv(x, w) u = SpaceToDepth<blocksize=2>(h) y = Conv(u, v) }"),
    "tile": ([4], "(float[N,6] x, float[6,4] f, float[12,5] g) => (float[N,5] y) <int64[2] n = {1,3}>"
        "{ h = MatMul(x, f) t = Tile(h, n) y = MatMul(t, g) }"),
    "expand": ([4], "(float[2,1,6] x, float[6,4] f, float[4,5] g) => (float[2,3,5] y) <int64[3] n = {2,3,4}>"
        "{ h = MatMul(x, f) t = Expand(h, n) y = MatMul(t, g) }"),
    "where": ([4], "(float[N,6] x, float[6,4] f, float[1,4] c, float[4,5] g) => (float[N,5] y)"
        "{ h = MatMul(x, f) z = Abs(h) m = Greater(h, z) t = Where(m, c, h) y = MatMul(t, g) }"),
    "prelu": ([8], "(float[N,3,4,4] x, float[8,3,1,1] w, float[8,1,1] s, float[5,8,1,1] v) => (float[N,5,4,4] y)"
        "{ h = Conv(x, w) p = PRelu(h, s) y = Conv(p, v) }"),
    "division by a masked tensor": ([4], "(float[N,6] x, float[6,4] f, float[6,4] e, float[4,5] g) => (float[N,5] y)"
        "{ h = MatMul(x, f) d = MatMul(x, e) q = Div(h, d) y = MatMul(q, g) }"),
    "size that is read": ([4], "(float[N,6] x, float[6,4] f, float[4,5] g) => (float[N,5] y, int64[2] n)"
        "{ h = MatMul(x, f) n = Shape(h) y = MatMul(h, g) }"),
    "attention by heads": ([3], "(float[N,4,6] x, float[6,36] w, float[12,5] o) => (float[N,4,5] y)"
        "<int64[5] split = {0,4,3,3,4}, int64[3] join = {0,4,12}, int64 zero = {0}, int64 one = {1}, int64 two = {2}>"
        "{ p = MatMul(x, w) s = Reshape(p, split) t = Transpose<perm=[2,0,3,1,4]>(s) q = Gather<axis=0>(t, zero)"
        "k = Gather<axis=0>(t, one) v = Gather<axis=0>(t, two) kt = Transpose<perm=[0,1,3,2]>(k) a = MatMul(q, kt)"
        "z = Softmax(a) c = MatMul(z, v) d = Transpose<perm=[0,2,1,3]>(c) e = Reshape(d, join) y = MatMul(e, o) }"),
    "einsum": ([3, 8], "(float[N,4,6] x, float[6,3,8] a, float[3,8,5] b) => (float[N,4,5] y)"
        "{ h = Einsum<equation=\"bsi,ihd->bshd\">(x, a) r = Relu(h) y = Einsum<equation=\"bshd,hdo->bso\">(r, b) }"),
    "einsum with an ellipsis": ([7], "(float[N,4,6] x, float[6,7] a, float[7,5] b) => (float[N,4,5] y)"
        "{ h = Einsum<equation=\"...i,ij->...j\">(x, a) y = Einsum<equation=\"...j,jk\">(h, b) }"),
    "einsum of two activations": ([3], "(float[N,4,6] x, float[6,12] a, float[6,12] b, float[12,5] o)"
        "=> (float[N,4,5] y) <int64[4] split = {0,4,3,4}, int64[3] join = {0,4,12}> { p = MatMul(x, a)"
        "q = Reshape(p, split) r = MatMul(x, b) k = Reshape(r, split)"
        "s = Einsum<equation=\"bqhd,bkhd->bhqk\">(q, k) z = Softmax(s)"
        "c = Einsum<equation=\"bhqk,bkhd->bqhd\">(z, k) e = Reshape(c, join) y = MatMul(e, o) }"),
    "heads folded into a dynamic batch": ([3], "(float[4,N,6] x, float[6,12] a, float[6,12] b, float[12,5] o)"
        "=> (float[4,N,5] y) <int64[3] fold = {4,-1,4}, int64[3] join = {4,-1,12}> { p = MatMul(x, a)"
        "q = Reshape(p, fold) r = MatMul(x, b) k = Reshape(r, fold) qt = Transpose<perm=[1,0,2]>(q)"
        "kt = Transpose<perm=[1,2,0]>(k) s = MatMul(qt, kt) z = Softmax(s) vt = Transpose<perm=[1,0,2]>(k)"
        "c = MatMul(z, vt) d = Transpose<perm=[1,0,2]>(c) e = Reshape(d, join) y = MatMul(e, o) }"),
    "grouped queries": ([2], "(float[N,4,6] x, float[6,16] a, float[6,8] b, float[6,8] c, float[16,5] o)"
        "=> (float[N,4,5] y) <int64[4] q4 = {0,4,4,4}, int64[4] k4 = {0,4,2,4}, int64[1] two = {2},"
        "int64[5] twice = {1,1,2,1,1}, int64[4] whole = {0,4,4,4}, int64[3] join = {0,4,16}> { p = MatMul(x, a)"
        "q0 = Reshape(p, q4) q = Transpose<perm=[0,2,1,3]>(q0) r = MatMul(x, b) k0 = Reshape(r, k4)"
        "k1 = Transpose<perm=[0,2,1,3]>(k0) k2 = Unsqueeze(k1, two) k3 = Expand(k2, twice) k = Reshape(k3, whole)"
        "s = MatMul(x, c) v0 = Reshape(s, k4) v1 = Transpose<perm=[0,2,1,3]>(v0) v2 = Unsqueeze(v1, two)"
        "v3 = Expand(v2, twice) v = Reshape(v3, whole) kt = Transpose<perm=[0,1,3,2]>(k) w = MatMul(q, kt)"
        "z = Softmax(w) n = MatMul(z, v) d = Transpose<perm=[0,2,1,3]>(n) e = Reshape(d, join) y = MatMul(e, o) }"),
    "a target that is computed": ([4], "(float[N,M,6] x, float[6,8] a, float[4,5] b) => (float[N,M,2,5] y)"
        "<int64[1] two = {2}, int64[1] four = {4}, int64[1] zero = {0}, int64[1] one = {1}>"
        "{ h = MatMul(x, a) s = Shape(x) n = Slice(s, zero, one) m = Slice(s, one, two)"
        "t = Concat<axis=0>(n, m, two, four) r = Reshape(h, t) y = MatMul(r, b) }"),
    "slice with a step": ([4, 4], "(float[N,6] x, float[6,8] f, float[4,5] g, float[8,5] k) => (float[N,5] y)"
        "<int64[1] start = {0}, int64[1] end = {8}, int64[1] axes = {1}, int64[1] step = {2}> { h = MatMul(x, f)"
        "s = Slice(h, start, end, axes, step) p = MatMul(s, g) q = MatMul(h, k) y = Add(p, q) }"),
    "reversed": ([8], "(float[N,6] x, float[6,8] f, float[8,5] g) => (float[N,5] y)"
        "<int64[1] start = {-1}, int64[1] end = {-9223372036854775807}, int64[1] axes = {1}, int64[1] step = {-1}>"
        "{ h = MatMul(x, f) s = Slice(h, start, end, axes, step) y = MatMul(s, g) }"),
    "a single position is picked": ([7], "(float[N,6] x, float[6,8] f, float[8,5] g) => (float[N,5] y, float[N] z)"
        "<int64 three = {3}> { h = MatMul(x, f) z = Gather<axis=1>(h, three) y = MatMul(h, g) }"),
    "scatter along the sequence": ([8], "(float[N,4,6] x, float[6,8] f, float[8,5] g) => (float[N,4,5] y)"
        "<int64[1,1] where = {0}, int64[1] zero = {0}, int64[1] one = {1}> { h = MatMul(x, f)"
        "u = Slice(h, zero, one, zero) n = Neg(u) s = ScatterND(h, where, n) y = MatMul(s, g) }"),
    "scatter of another tensor": ([8], "(float[N,4,6] x, float[6,8] f, float[6,8] e, float[8,5] g) => (float[N,4,5] y)"
        "<int64[1,1] where = {0}, int64[1] zero = {0}, int64[1] one = {1}> { h = MatMul(x, f) k = MatMul(x, e)"
        "u = Slice(k, zero, one, zero) s = ScatterND(h, where, u) y = MatMul(s, g) }"),
    "deformable": ([8, 6], "(float[N,3,6,6] x, float[8,3,1,1] w, float[8] b, float[18,3,3,3] o, float[6,8,3,3] d,"
        "float[6] c, float[5,6,1,1] v) => (float[N,5,4,4] y) { h = Conv(x, w, b) f = Conv(x, o)"
        "e = DeformConv<kernel_shape=[3,3]>(h, d, f, c) y = Conv(e, v) }"),
    "gather by position pairs": ([8], "(float[2,4,6] x, float[6,8] f, float[8,5] g) => (float[3,5] y)"
        "<int64[3,2] where = {0,1,1,3,0,0}> { h = MatMul(x, f) p = GatherND(h, where) y = MatMul(p, g) }"),
    "top k over the sequence": ([8], "(float[N,4,6] x, float[6,8] f, float[8,5] g) => (float[N,2,5] y)"
        "<int64[1] two = {2}> { h = MatMul(x, f) v, i = TopK<axis=1>(h, two) y = MatMul(v, g) }"),
    "triangle": ([3], "(float[N,3,4,4] x, float[3,3,1,1] w, float[5,3,1,1] v) => (float[N,5,4,4] y)"
        "{ h = Conv(x, w) u = Trilu(h) y = Conv(u, v) }"),
    "sampled at points": ([8], "(float[2,3,6,6] x, float[2,4,4,2] grid, float[8,3,1,1] w, float[5,8,1,1] v)"
        "=> (float[2,5,4,4] y) { h = Conv(x, w) s = GridSample(h, grid) y = Conv(s, v) }"),
    "length over channels": ([8], "(float[N,6] x, float[6,8] f, float[8,5] g) => (float[N,5] y)"
        "{ h = MatMul(x, f) n = LpNormalization<axis=1>(h) y = MatMul(n, g) }"),
    "quantised pairs": ([8], "(float[N,3,6,6] x, int8[8,3,1,1] w, float[8] ws, int8[8] wz, float[5,8,1,1] v)"
        "=> (float[N,5,6,6] y) <float s = {0.05}, int8 z = {3}> { d = DequantizeLinear<axis=0>(w, ws, wz)"
        "h = Conv(x, d) q = QuantizeLinear(h, s, z) e = DequantizeLinear(q, s, z) y = Conv(e, v) }"),
    "quantised on the fly": ([8], "(float[N,6] x, float[6,8] f, int8[8,5] w, int8[5] wz) => (float[N,5] y)"
        "{ h = MatMul(x, f) r = Relu(h) q, s, z = DynamicQuantizeLinear(r) m = MatMulInteger(q, w, z, wz)"
        "c = Cast<to=1>(m) y = Mul(c, s) }"),
    "two-dimensional position bias": ([3], "(float[N,4,6] x, float[6,12] a, float[6,12] b, float[9,3] t,"
        "float[12,5] o) => (float[N,4,5] y) <int64[2,2] p0 = {0,1,2,8}, int64[2] twos = {2,2},"
        "int64[4] split = {0,4,3,4}, int64[3] join = {0,4,12}, int64[1] zero = {0}>"
        "{ g = MatMul(x, a) q0 = Reshape(g, split) q = Transpose<perm=[0,2,1,3]>(q0) r = MatMul(x, b)"
        "k0 = Reshape(r, split) k = Transpose<perm=[0,2,3,1]>(k0) v = Transpose<perm=[0,2,1,3]>(k0) s = MatMul(q, k)"
        "p = Tile(p0, twos) u = Gather(t, p) w = Transpose<perm=[2,0,1]>(u) i = Unsqueeze(w, zero)"
        "j = Add(s, i) z = Softmax(j)"
        "c = MatMul(z, v) d = Transpose<perm=[0,2,1,3]>(c) e = Reshape(d, join) y = MatMul(e, o) }"),
    "packed attention of onnxruntime": ([3], "(float[N,4,6] x, float[6,36] w, float[36] b, float[12,5] o)"
        "=> (float[N,4,5] y) { h = com.microsoft.Attention<num_heads=3>(x, w, b) y = MatMul(h, o) }"),
    "multi-head attention of onnxruntime": ([3], "(float[N,4,6] x, float[6,12] a, float[6,12] b, float[6,12] c,"
        "float[36] d, float[12,5] o) => (float[N,4,5] y) { q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c)"
        "h = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v, d) y = MatMul(h, o) }"),
    "fused convolution": ([8], "(float[N,3,6,6] x, float[8,3,1,1] w, float[8] b, float[8,3,1,1] u, float[5,8,1,1] v)"
        "=> (float[N,5,6,6] y) { k = Conv(x, u) h = com.microsoft.FusedConv<activation=\"Relu\">(x, w, b, k)"
        "y = Conv(h, v) }"),
    "fused gelu and bias": ([7], "(float[N,4,6] x, float[6,7] f, float[7] b, float[7,5] g) => (float[N,4,5] y)"
        "{ h = MatMul(x, f) s = com.microsoft.BiasGelu(h, b) y = MatMul(s, g) }"),
    "transposing product of onnxruntime": ([7], "(float[N,4,6] x, float[7,6] f, float[7,5] g) => (float[N,4,5] y)"
        "{ h = com.microsoft.FusedMatMul<transB=1>(x, f) y = MatMul(h, g) }"),
    "packed weights by rows and blocks": ([2], "(float[N,4,6] x, float[6,32] f, uint8[5,2,8] w, float[5,2] s)"
        "=> (float[N,4,5] y) { h = MatMul(x, f)"
        "y = com.microsoft.MatMulNBits<K=32, N=5, bits=4, block_size=16>(h, w, s) }"),
    "packed weights whose zeros share bytes": ([3], "(float[N,4,6] x, float[6,96] f, uint8[5,6,8] w, float[5,6] s,"
        "uint8[5,3] z) => (float[N,4,5] y) { h = MatMul(x, f)"
        "y = com.microsoft.MatMulNBits<K=96, N=5, bits=4, block_size=16>(h, w, s, z) }"),
    "packed weights whose last byte is half empty": ([1, 1], "(float[N,4,6] x, float[6,48] f, uint8[5,3,8] w,"
        "float[5,3] s, uint8[5,2] z) => (float[N,4,5] y) { h = MatMul(x, f)"
        "y = com.microsoft.MatMulNBits<K=48, N=5, bits=4, block_size=16>(h, w, s, z) }"),
    "packed weights whose scales lie in one row": ([8], "(float[N,4,32] x, uint8[8,2,8] w, float[16] s, float[8,5] g)"
        "=> (float[N,4,5] y) { h = com.microsoft.MatMulNBits<K=32, N=8, bits=4, block_size=16>(x, w, s)"
        "r = Relu(h) y = MatMul(r, g) }"),
    "quantised in blocks": ([6], "(float[N,4] x, int8[4,6] w, float[2,6] s, int8[2,6] z, float[6,5] g)"
        "=> (float[N,5] y) { d = DequantizeLinear<axis=0, block_size=2>(w, s, z) h = MatMul(x, d) r = Relu(h)"
        "y = MatMul(r, g) }"),
    "quantised in blocks along the last axis": ([6], "(float[N,4] x, int8[6,4] w, float[6,2] s, float[6,5] g)"
        "=> (float[N,5] y) { d = DequantizeLinear<axis=-1, block_size=2>(w, s) t = Transpose<perm=[1,0]>(d)"
        "h = MatMul(x, t) r = Relu(h) y = MatMul(r, g) }"),
    "whole blocks": ([3], "(float[N,3] x, float[3,12] f, int8[12,6] w, float[3,6] s) => (float[N,6] y)"
        "{ h = MatMul(x, f) d = DequantizeLinear<axis=0, block_size=4>(w, s) y = MatMul(h, d) }"),
    "integer convolution": ([8], "(float[N,3,6,6] x, float[8,3,1,1] u, int8[5,8,1,1] w) => (float[N,5,6,6] y)"
        "{ h = Conv(x, u) r = Relu(h) q, s, z = DynamicQuantizeLinear(r) m = ConvInteger(q, w, z) c = Cast<to=1>(m)"
        "y = Mul(c, s) }"),
    "grouped queries of onnxruntime": ([2], "(float[2,4,6] x, float[6,64] a, float[6,32] b, float[6,32] c,"
        "float[64,5] o) => (float[2,4,5] y) <int32[2] lengths = {3,3}, int32[1] total = {4}> { q = MatMul(x, a)"
        "k = MatMul(x, b) v = MatMul(x, c) h, pk, pv = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>"
        "(q, k, v, , , lengths, total) y = MatMul(h, o) }"),
    "multi-head attention with a mask": ([3], "(float[2,4,6] x, float[6,12] a, float[6,12] b, float[6,12] c,"
        "float[1,3,4,4] m, float[12,5] o) => (float[2,4,5] y) { q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c)"
        "h = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v, , , m) y = MatMul(h, o) }"),
    "fused product and bias": ([7], "(float[N,6] x, float[7,6] f, float[7] b, float[7,5] g) => (float[N,5] y)"
        "{ h = com.microsoft.FusedGemm<transB=1, activation=\"Relu\">(x, f, b) y = MatMul(h, g) }"),
    "gather element by element": ([4], "(float[2,3,6] x, float[6,4] f, float[6,4] e, float[4,5] g) => (float[2,3,5] y)"
        "{ h = MatMul(x, f) k = MatMul(x, e) i = Greater(k, h) j = Cast<to=7>(i) p = GatherElements<axis=1>(h, j)"
        "y = MatMul(p, g) }"),
    "reversed in time": ([8], "(float[4,2,6] x, float[6,8] f, float[8,5] g) => (float[4,2,5] y)"
        "<int64[2] lengths = {4,2}> { h = MatMul(x, f) r = ReverseSequence(h, lengths) y = MatMul(r, g) }"),
    "pooled regions": ([8], "(float[2,3,6,6] x, float[8,3,1,1] w, float[3,4] rois, float[5,8,1,1] v)"
        "=> (float[3,5,2,2] y) <int64[3] which = {0,1,0}> { h = Conv(x, w)"
        "r = RoiAlign<output_height=2, output_width=2>(h, rois, which) y = Conv(r, v) }"),
    "normalised over space": ([8], "(float[2,3,6,6] x, float[8,3,1,1] w, float[5,8,1,1] v) => (float[2,5,6,6] y)"
        "{ h = Conv(x, w) n = MeanVarianceNormalization<axes=[0,2,3]>(h) y = Conv(n, v) }"),
    "shapes that are read": ([8], "(float[N,6] x, float[6,8] f, float[8,5] g) => (float[N,5] y, int64 n)"
        "{ h = MatMul(x, f) n = Size(x) y = MatMul(h, g) }"),
    "a sum that is logged": ([8], "(float[N,6] x, float[6,8] f) => (float[N,1] y) <int64[1] axes = {1}>"
        "{ h = MatMul(x, f) a = Abs(h) y = ReduceLogSum(a, axes) }"),
}  # fmt: skip

NEWER = {  # operators of opset 23
    "attention operator over joined heads": ([3], "(float[N,4,6] x, float[6,12] a, float[6,12] b, float[6,12] c,"
        "float[12,5] o) => (float[N,4,5] y) { q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c)"
        "h = Attention<q_num_heads=3, kv_num_heads=3>(q, k, v) y = MatMul(h, o) }"),
    "attention operator with shared heads": ([2], "(float[N,4,6] x, float[6,16] a, float[6,8] b, float[6,8] c,"
        "float[16,5] o) => (float[N,4,5] y) { q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c)"
        "h = Attention<q_num_heads=4, kv_num_heads=2>(q, k, v) y = MatMul(h, o) }"),
    "attention operator over separate heads": ([3], "(float[N,4,6] x, float[6,12] a, float[6,12] b, float[12,5] o)"
        "=> (float[N,4,5] y) <int64[4] split = {0,4,3,4}, int64[3] join = {0,4,12}> { p = MatMul(x, a)"
        "q = Reshape(p, split) r = MatMul(x, b) k = Reshape(r, split) qt = Transpose<perm=[0,2,1,3]>(q)"
        "kt = Transpose<perm=[0,2,1,3]>(k)"
        "h = Attention(qt, kt, kt) d = Transpose<perm=[0,2,1,3]>(h) e = Reshape(d, join) y = MatMul(e, o) }"),
    "rotary embedding": ([3], "(float[2,4,6] x, float[6,12] a, float[2,4,2] c, float[2,4,2] s, float[12,5] o)"
        "=> (float[2,4,5] y) { h = MatMul(x, a) r = RotaryEmbedding<num_heads=3>(h, c, s) y = MatMul(r, o) }"),
}  # fmt: skip

INEXACT = {
    "layer norm": ([8], "(float[N,4,6] x, float[6,8] f, float[8] s, float[8] b, float[8,5] g) => (float[N,4,5] y)"
        "{ h = MatMul(x, f) n = LayerNormalization(h, s, b) y = MatMul(n, g) }"),
    "mean over channels": ([8], "(float[N,6] x, float[6,8] f) => (float[N,1] y) <int64[1] axes = {1}>"
        "{ h = MatMul(x, f) r = Relu(h) y = ReduceMean<keepdims=1>(r, axes) }"),
    "local response": ([8], "(float[N,3,4,4] x, float[8,3,1,1] w, float[5,8,1,1] v) => (float[N,5,4,4] y)"
        "{ h = Conv(x, w) n = LRN<size=3>(h) y = Conv(n, v) }"),
    "skip layer norm": ([8], "(float[N,4,6] x, float[6,8] f, float[6,8] e, float[8] s, float[8] b, float[8,5] g)"
        "=> (float[N,4,5] y) { h = MatMul(x, f) k = MatMul(x, e)"
        "n, m, i, a = com.microsoft.SkipLayerNormalization(h, k, s, b) c = Add(n, a) y = MatMul(c, g) }"),
    "norm of folded groups": ([4], "(float[N,3,4,4] x, float[8,3,1,1] w, float[2] s, float[2] b, float[5,8,1,1] v)"
        "=> (float[N,5,4,4] y) <int64[3] fold = {0,2,-1}, int64[4] back = {0,8,4,4}> { h = Conv(x, w)"
        "r = Reshape(h, fold) n = InstanceNormalization(r, s, b) t = Reshape(n, back) y = Conv(t, v) }"),
    "maximum over channels": ([8], "(float[N,3,4,4] x, float[8,3,1,1] w, float[5,8,1,1] v) => (float[N,5,4,4] y)"
        "<int64[1] axes = {1}> { h = Conv(x, w) m = ReduceMax<keepdims=1>(h, axes) s = Sigmoid(m) g = Mul(h, s)"
        "y = Conv(g, v) }"),
    "group norm": ([4], "(float[N,3,4,4] x, float[8,3,1,1] w, float[8] s, float[8] b, float[5,8,1,1] v)"
        "=> (float[N,5,4,4] y) { h = Conv(x, w) n = GroupNormalization<num_groups=2>(h, s, b) y = Conv(n, v) }"),
    "means over channels and space": ([8], "(float[2,3,6,6] x, float[8,3,1,1] w, float[5,8,1,1] v)"
        "=> (float[2,5,6,6] y) { h = Conv(x, w) n = MeanVarianceNormalization<axes=[1,2,3]>(h) y = Conv(n, v) }"),
    "convolution over channels": ([8], "(float[2,3,6,6] x, float[8,3,1,1] w, float[1,1,3] e, float[5,8,1,1] v)"
        "=> (float[2,5,6,6] y) <int64[3] flat = {2,1,8}, int64[4] back = {2,8,1,1}> { h = Conv(x, w)"
        "g = GlobalAveragePool(h) f = Reshape(g, flat) c = Conv<pads=[1,1]>(f, e) s = Sigmoid(c) b = Reshape(s, back)"
        "m = Mul(h, b) y = Conv(m, v) }"),
    "group norm over channels in the last axis": ([8], "(float[N,4,6] x, float[6,8] f, float[4] s, float[4] b,"
        "float[8,5] g) => (float[N,4,5] y) { h = MatMul(x, f) n = GroupNormalization<num_groups=2>(h, s, b)"
        "y = MatMul(n, g) }"),
    "skip of constant positions": ([8], "(float[2,4,6] x, float[6,8] f, float[2,4,8] p, float[8] s, float[8,5] g)"
        "=> (float[2,4,5] y) { h = MatMul(x, f) n = com.microsoft.SkipLayerNormalization(h, p, s) y = MatMul(n, g) }"),
    "embedding and norm": ([8], "(int32[2,4] ids, float[9,8] t, float[4,8] p, float[8] s, float[8] b, float[8,5] g)"
        "=> (float[2,4,5] y) { h, m = com.microsoft.EmbedLayerNormalization(ids, , t, p, , s, b) y = MatMul(h, g) }"),
    "smallest over channels": ([8], "(float[N,3,4,4] x, float[8,3,1,1] w, float[5,8,1,1] v) => (float[N,5,4,4] y)"
        "<int64[1] axes = {1}> { h = Conv(x, w) m = ReduceMin<keepdims=1>(h, axes) g = Mul(h, m) y = Conv(g, v) }"),
    "elman network": ([7], "(float[4,N,6] x, float[1,7,6] w, float[1,7,7] r, float[1,14] b, float[7,5] g)"
        "=> (float[4,N,5] y) <int64[1] axes = {1}> { h = RNN<hidden_size=7>(x, w, r, b) s = Squeeze(h, axes)"
        "y = MatMul(s, g) }"),
    "lstm with peepholes and states": ([7], "(float[4,2,6] x, float[1,28,6] w, float[1,28,7] r, float[1,56] b,"
        "float[1,2,7] h0, float[1,2,7] c0, float[1,21] p, float[7,5] g) => (float[4,2,5] y) <int64[1] axes = {1}>"
        "{ h, z, c = LSTM<hidden_size=7>(x, w, r, b, , h0, c0, p) s = Squeeze(h, axes) y = MatMul(s, g) }"),
    "gru": ([7], "(float[4,N,6] x, float[1,21,6] w, float[1,21,7] r, float[1,42] b, float[7,5] g)"
        "=> (float[4,N,5] y) <int64[1] axes = {1}> { h = GRU<hidden_size=7>(x, w, r, b) s = Squeeze(h, axes)"
        "y = MatMul(s, g) }"),
    "two-way lstm": ([7], "(float[4,N,6] x, float[2,28,6] w, float[2,28,7] r, float[2,56] b, float[14,5] g)"
        "=> (float[4,N,5] y) <int64[3] join = {0,0,-1}> "
        "{ h = LSTM<hidden_size=7, direction=\"bidirectional\">(x, w, r, b)"
        "t = Transpose<perm=[0,2,1,3]>(h) s = Reshape(t, join) y = MatMul(s, g) }"),
}  # fmt: skip

LOCKED = {
    "output": "(float[N,6] x, float[6,4] f) => (float[N,4] y) { y = MatMul(x, f) }",
    "softmax": "(float[N,6] x, float[6,4] f, float[4,5] g) => (float[N,5] y)"
        "{ h = MatMul(x, f) s = Softmax(h) y = MatMul(s, g) }",
    "sorted": "(float[N,6] x, float[6,4] f, float[2,5] g) => (float[N,5] y) <int64[1] two = {2}>"
        "{ h = MatMul(x, f) v, i = TopK<axis=1>(h, two) y = MatMul(v, g) }",
    "running sum": "(float[N,6] x, float[6,4] f, float[4,5] g) => (float[N,5] y) <int64 one = {1}>"
        "{ h = MatMul(x, f) c = CumSum(h, one) y = MatMul(c, g) }",
    "triangle over channels": "(float[2,4,6] x, float[6,4] f, float[4,5] g) => (float[2,4,5] y)"
        "{ h = MatMul(x, f) t = Trilu(h) y = MatMul(t, g) }",
    "blocks that aren't full": "(float[N,3] x, float[3,5] f, int8[5,6] w, float[3,6] s) => (float[N,6] y)"
        "{ h = MatMul(x, f) d = DequantizeLinear<axis=0, block_size=2>(w, s) y = MatMul(h, d) }",
    "packed weights whose last block isn't full": "(float[N,4,6] x, float[6,24] f, uint8[5,2,8] w, float[5,2] s)"
        "=> (float[N,4,5] y) { h = MatMul(x, f)"
        "y = com.microsoft.MatMulNBits<K=24, N=5, bits=4, block_size=16>(h, w, s) }",
    "pooling that says where": "(float[N,3,6,6] x, float[8,3,1,1] w, float[5,8,1,1] v)"
        "=> (float[N,5,3,3] y, int64[N,8,3,3] i) { h = Conv(x, w)"
        "p, i = MaxPool<kernel_shape=[2,2], strides=[2,2]>(h) y = Conv(p, v) }",
    "a convolution slides over them": "(float[N,3,6] x, float[6,8] f, float[5,3,3] w) => (float[N,5,6] y)"
        "{ h = MatMul(x, f) y = Conv(h, w) }",
    "product over channels": "(float[N,6] x, float[6,4] f) => (float[N,1] y) <int64[1] axes = {1}>"
        "{ h = MatMul(x, f) y = ReduceProd(h, axes) }",
    "a diagonal": "(float[N,4,6] x, float[6,4] f) => (float[N,4] y)"
        "{ h = MatMul(x, f) y = Einsum<equation=\"bii->bi\">(h) }",
    "deformable by two sets of offsets": "(float[N,3,6,6] x, float[8,3,1,1] w, float[36,3,3,3] o, float[6,8,3,3] d)"
        "=> (float[N,6,4,4] y) { h = Conv(x, w) f = Conv(x, o)"
        "y = DeformConv<kernel_shape=[3,3], offset_group=2>(h, d, f) }",
    "unknown operator": "(float[N,6] x, float[6,4] f, float[4,5] g) => (float[N,5] y)"
        "{ h = MatMul(x, f) s = Det(h) t = Add(h, s) y = MatMul(t, g) }",
    "indexed by data": "(float[N,6] x, int64[2] i, float[6,4] f) => (float[N,2] y)"
        "{ h = MatMul(x, f) y = Gather<axis=1>(h, i) }",
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_exact(name: str) -> None:
    sizes, text = EXACT[name]
    units = check_oracle(graph(text), tolerance=0.03 if "DynamicQuantize" in text else 2e-5)
    assert [len(group.units) for group in units.groups] == sizes
    assert all(group.exact for group in units.groups)


@pytest.mark.parametrize("name", NEWER)
def test_exact_in_a_newer_opset(name: str) -> None:
    sizes, text = NEWER[name]
    units = check_oracle(graph(text, opset=23))
    assert [len(group.units) for group in units.groups] == sizes


def test_root_mean_square_norm() -> None:
    text = """(float[N,4,6] x, float[6,8] f, float[8] s, float[8,5] g) => (float[N,4,5] y)
    { h = MatMul(x, f) n = RMSNormalization(h, s) y = MatMul(n, g) }"""
    units = check_oracle(graph(text, opset=23))
    assert [len(group.units) for group in units.groups] == [8]
    assert not units.groups[0].exact


def test_whole_groups_of_a_norm_are_exact() -> None:
    units = check_oracle(graph(INEXACT["group norm"][1]), granularity="rows")
    assert [len(group.units) for group in units.groups] == [2]
    assert units.groups[0].exact


def test_every_operator_is_ruled_or_locked_with_a_reason() -> None:
    """A new onnx brings new operators: somebody must decide what each of them means."""
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == "" and not schema.deprecated}
    assert names - set(RULES) - set(LOCKED_OPERATORS) == set()
    assert not set(RULES) & set(LOCKED_OPERATORS)


@pytest.mark.parametrize("name", INEXACT)
def test_inexact_runs_and_says_so(name: str) -> None:
    sizes, text = INEXACT[name]
    units = check_oracle(graph(text, ("ids",) if "ids," in text else ("x",)))
    assert [len(group.units) for group in units.groups] == sizes
    assert not any(group.exact for group in units.groups)


@pytest.mark.parametrize("name", [name for name in LOCKED if name not in ("unknown operator", "indexed by data")])
def test_locked_with_a_reason(name: str) -> None:
    units = check_oracle(graph(LOCKED[name]))
    assert not [group for group in units.groups if len(group.units) > 1]
    assert units.solution.lock_reasons()


@pytest.mark.parametrize("granularity", ["rows", "columns"])
def test_past_keys_and_values_from_outside_are_locked(granularity: str) -> None:
    text = """(float[2,4,6] x, float[6,12] a, float[6,12] b, float[6,12] c, float[2,3,5,4] pk, float[2,3,5,4] pv,
    float[12,5] o) => (float[2,4,5] y, float[2] z) <int64[3] all = {1, 2, 3}>
    { q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c)
      h, nk, nv = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v, , , , pk, pv) y = MatMul(h, o)
      s = ReduceSum<keepdims=0>(nk, all) t = ReduceSum<keepdims=0>(nv, all) z = Add(s, t) }"""
    units = check_oracle(graph(text, ("x", "pk", "pv")), granularity=granularity)
    assert not units.groups


def test_a_padding_mask_is_read_as_it_is() -> None:
    text = """(float[2,4,6] x, float[6,12] a, float[6,12] b, float[6,12] c, float[12,5] o) => (float[2,4,5] y)
    <int32[2,4] m = {1,1,1,0,1,1,0,0}> { q = MatMul(x, a) k = MatMul(x, b) v = MatMul(x, c)
      h = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v, , m) y = MatMul(h, o) }"""
    units = check_oracle(graph(text))
    assert [len(group.units) for group in units.groups] == [3]


KINDS_OF = {
    "residual": ["residual", "width"],
    "attention by heads": ["head"],
    "grouped": ["width", "width"],
    "conv": ["width"],
}


@pytest.mark.parametrize("name", KINDS_OF)
def test_kinds(name: str) -> None:
    assert [group.kind for group in find_units(analyse(graph(EXACT[name][1]))).groups] == KINDS_OF[name]


def test_indexed_by_data_is_locked() -> None:
    units = check_oracle(graph(LOCKED["indexed by data"], ("x", "i")))
    assert not units.groups


@pytest.mark.parametrize(("granularity", "sizes"), [("rows", [3]), ("columns", [4, 4])])
def test_granularity_of_heads(granularity: str, sizes: list[int]) -> None:
    units = check_oracle(graph(EXACT["attention by heads"][1]), granularity=granularity)
    assert [len(group.units) for group in units.groups] == sizes


HEADS_IN_THE_BATCH = """(float[2,4,6] x, float[6,12] a, float[4,1,3] k, float[12,5] o) => (float[2,4,5] y)
<int64[4] split = {2,4,3,4}, int64[3] fold = {6,4,4}, int64[4] back = {2,3,4,4}, int64[3] join = {2,4,12}>
{ p = MatMul(x, a) q = Reshape(p, split) t = Transpose<perm=[0,2,3,1]>(q) f = Reshape(t, fold)
  c = Conv<group=4, pads=[1,1]>(f, k) u = Reshape(c, back) w = Transpose<perm=[0,3,1,2]>(u) e = Reshape(w, join)
  y = MatMul(e, o) }"""


@pytest.mark.parametrize(("granularity", "sizes"), [("rows", [3]), ("columns", [4])])
def test_heads_in_the_batch_of_a_convolution(granularity: str, sizes: list[int]) -> None:
    units = check_oracle(graph(HEADS_IN_THE_BATCH), granularity=granularity)
    assert [len(group.units) for group in units.groups] == sizes


def test_an_axis_that_a_rule_forgets_is_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(flow: Flow, node: ir.Node) -> None:
        flow.of(node.inputs[0])

    monkeypatch.setitem(RULES, "Relu", forgetful)
    text = (
        "(float[N,6] x, float[6,8] a, float[8,5] b) => (float[N,5] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }"
    )
    units = find_units(analyse(graph(text)))
    assert not units.groups
    assert "Relu loses it" in {lock.reason for lock in units.solution.lock_reasons().values()}


def test_granularity_of_groups() -> None:
    units = check_oracle(graph(EXACT["grouped"][1]), granularity="rows")
    assert [len(group.units) for group in units.groups] == [2]


def test_sizes_that_another_operator_reads_stay_as_they_are() -> None:
    """The constants in a computed target are integers that must not be cut, though nothing but the target uses them."""
    text = """(float[N,3,4,4] x, float[8,3,1,1] w, float[5,8,1,1] v) => (float[N,5,H,W] y)
    <int64[2] space = {9, 9}, int64[1] zero = {0}, int64[1] two = {2}>
    { h = Conv(x, w) p = Conv(h, v) s = Shape(p) b = Slice(s, zero, two) t = Concat<axis=0>(b, space)
      y = Resize<mode="nearest">(p, , , t) }"""
    units = check_oracle(graph(text))
    assert [len(group.units) for group in units.groups] == [8]


def test_slices_of_what_has_no_labels() -> None:
    text = """(float[N,6] x, float[6,8] w, float[8,5] v) => (float[N,5] y, float[2,2] z)
    <int64[1] zero = {0}, int64[1] two = {2}, int64[1] axes = {-1}>
    { h = MatMul(x, w) y = MatMul(h, v) s = RandomNormal<shape=[2,4]>() z = Slice(s, zero, two, axes) }"""
    model = ir.from_proto(proto(text))
    assert [len(group.units) for group in find_units(analyse(model)).groups] == [8]


def test_opset_13_reductions_and_old_shapes() -> None:
    text = (
        "(float[N,3,4,4] x, float[8,3,1,1] w, float[8,5] f) => (float[N,5] y)"
        "{ h = Conv(x, w) m = ReduceMean<axes=[2,3], keepdims=0>(h) y = MatMul(m, f) }"
    )
    units = check_oracle(graph(text, opset=13))
    assert [len(group.units) for group in units.groups] == [8]
