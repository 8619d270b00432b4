"""Every row of the lowerings: the same function, and gradients equal to finite differences in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from scipy.special import erf

from onnxprune.errors import TrainingError
from onnxprune.evaluating.data import Dataset, random_inputs
from onnxprune.evaluating.evaluate import relative_difference, run_model
from onnxprune.training import Loss, TrainingOptions, client, find_runtime
from onnxprune.training.forward import evaluation_graph, trainable, training_graph
from onnxprune.training.losses import plan_loss
from tests.conftest import ROOT, needs_training
from tests.graphs import graph

MAP = "(float[N,3,6,6] x, float[8,3,1,1] w, float[8] b, float[5,8,1,1] v, float[8] s) => (float[N,5,H,W] y)"
ROW = "(float[N,6] x, float[6,8] w, float[8] s, float[8,5] v) => (float[N,5] y)"
SEQUENCE = "(float[7,4,6] x, {}) => (float[{}] y)"


def on_map(inner: str) -> str:
    return f"{MAP} {{ h = Conv(x, w, b) {inner} y = Conv(p, v) }}"


def on_row(inner: str, constants: str = "") -> str:
    return (
        f"{ROW.replace('(float[N,6] x', f'(float[N,6] x{constants}')} {{ h = MatMul(x, w) {inner} y = MatMul(p, v) }}"
    )


def recurrent(kind: str, gates: int, directions: int, attributes: str, inputs: str = "x, w, r, b") -> str:
    weights = (
        f"float[{directions},{gates * 5},6] w, float[{directions},{gates * 5},5] r, float[{directions},{10 * gates}] b"
    )
    return (
        f"(float[7,4,6] x, {weights}) => (float[7,{directions},4,5] y, float[{directions},4,5] z) "
        f"{{ y, z = {kind}<hidden_size=5{attributes}>({inputs}) }}"
    )


def upsampled(attributes: str, scales: str = "1.0, 1.0, 2.0, 2.0") -> str:
    return on_map(
        f"e = Constant<value = float[0] {{}}>() c = Constant<value = float[4] {{{scales}}}>() "
        f"p = Resize<{attributes}>(h, e, c)"
    )


def transposed(attributes: str, weight: str = "8,6,3,3") -> str:
    channels = 6 if "group=2" not in attributes else 12
    return (
        f"(float[N,3,6,6] x, float[8,3,1,1] w, float[{weight}] t, float[{channels}] b, float[5,{channels},1,1] v) => "
        f"(float[N,5,H,W] y) {{ h = Conv(x, w) p = ConvTranspose<{attributes}>(h, t, b) y = Conv(p, v) }}"
    )


KERNEL = ("float[8] s", "float[8,8,1,1] k")
FUSED = {
    "conv": on_map('p = com.microsoft.FusedConv<activation="Relu">(h, k, b, h)').replace(*KERNEL),
    "conv, clipped": on_map(
        'p = com.microsoft.FusedConv<activation="Clip", activation_params=[-0.5, 0.7]>(h, k)'
    ).replace(*KERNEL),
    "conv, hard sigmoid": on_map(
        'p = com.microsoft.FusedConv<activation="HardSigmoid", activation_params=[0.3, 0.4]>(h, k)'
    ).replace(*KERNEL),
    "gemm": on_row(
        'p = com.microsoft.FusedGemm<transB=1, activation="LeakyRelu", activation_alpha=0.2>(h, k, s)', ", float[8,8] k"
    ),
    "gelu": on_row("p = com.microsoft.BiasGelu(h, s)"),
    "gelu by tanh": on_row("p = com.microsoft.FastGelu(h, s)"),
    "gelu by sigmoid": on_row("p = com.microsoft.QuickGelu<alpha=1.5>(h)"),
    "skip layer norm": on_row(
        "i = Sin(h) q, , , r = com.microsoft.SkipLayerNormalization<epsilon=0.01>(h, i, s, t, u) p = Add(q, r)",
        ", float[8] t, float[8] u",
    ),
    "skip root mean square": on_row(
        "i = Sin(h) p = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.01>(h, i, s)"
    ),
    "attention": "(float[4,5,6] x, float[6,24] w, float[24] b, float[8,3] v) => (float[4,5,3] y) "
    "{ p = com.microsoft.Attention<num_heads=2>(x, w, b) y = MatMul(p, v) }",
    "attention, masked, of sizes of its own": "(float[4,3,6] x, float[6,20] w, float[20] b, float[4,3] v) => "
    "(float[4,3,3] y) { m = Constant<value = int32[4,3] {1,1,0,1,0,0,1,1,1,0,1,1}>() "
    "p = com.microsoft.Attention<num_heads=2, qkv_hidden_sizes=[8,8,4], scale=0.7>(x, w, b, m) y = MatMul(p, v) }",
    "many heads": "(float[4,5,8] x, float[8,8] w, float[8,8] u, float[24] b, float[4,2,5,5] a) => (float[4,5,8] y) "
    "{ q = MatMul(x, w) k = MatMul(x, u) y = com.microsoft.MultiHeadAttention<num_heads=2>(q, k, x, b, , a) }",
}

STATISTICS = (
    "t = Constant<value = float[8] {0.3,-0.2,0.5,0.1,-0.4,0.2,0.0,0.6}>() "
    "u = Constant<value = float[8] {0.5,1.2,0.9,2.0,0.3,1.0,0.7,1.5}>() "
)
NORMED = f"{STATISTICS} p = BatchNormalization<epsilon=0.01>(h, s, b, t, u)"

ROWS: dict[str, tuple[str, int]] = {
    "batch norm after a convolution": (on_map(NORMED), 21),
    "batch norm after a grouped convolution": (
        on_map(NORMED).replace("float[8,3,1,1] w", "float[8,1,3,3] w, float[8,3,1,1] k").replace(
            "h = Conv(x, w, b)", "g = Conv(x, k) h = Conv<group=8, pads=[1,1,1,1]>(g, w)"
        ), 21,
    ),
    "batch norm after a convolution that is read elsewhere": (
        on_map(f"{NORMED.replace('p = ', 'q = ')} p = Add(q, h)"), 21,
    ),
    "batch norm of rows": (on_row(NORMED, ", float[8] b"), 21),
    "hard swish": (on_map("p = HardSwish(h)"), 21),
    "hard sigmoid": (on_map("p = HardSigmoid<alpha=0.3, beta=0.4>(h)"), 21),
    "prelu": (on_row("p = PRelu(h, s)"), 21),
    "elu": (on_row("p = Elu<alpha=1.3>(h)"), 21),
    "selu": (on_row("p = Selu(h)"), 21),
    "celu": (on_row("p = Celu<alpha=1.7>(h)"), 21),
    "softplus": (on_row("p = Softplus(h)"), 21),
    "mish": (on_row("p = Mish(h)"), 21),
    "softsign": (on_row("p = Softsign(h)"), 22),
    "thresholded": (on_row("p = ThresholdedRelu<alpha=0.2>(h)"), 22),
    "swish of a newer opset": (on_row("p = Swish(h)"), 24),
    "gelu": (on_row("p = Gelu(h)"), 20),
    "dropout": (on_row("p = Dropout(h)"), 21),
    "sum of three": (on_row("t = Tanh(h) p = Sum(h, s, t)"), 21),
    "mean of three": (on_row("t = Tanh(h) p = Mean(h, s, t)"), 21),
    "max of three": (on_row("t = Tanh(h) p = Max(h, s, t)"), 21),
    "max of two": (on_row("p = Max(h, s)"), 21),
    "largest": (on_row("a = Constant<value = int64[1] {1}>() m = ReduceMax(h, a) p = Sub(h, m)"), 21),
    "smallest, not kept": (
        on_row(
            "a = Constant<value = int64[1] {-1}>() m = ReduceMin<keepdims=0>(h, a) u = Unsqueeze(m, a) p = Mul(h, u)"
        ),
        21,
    ),
    "largest, axes as attribute": (on_row("m = ReduceMax<axes=[1]>(h) p = Sub(h, m)"), 17),
    "sum of magnitudes": (on_row("a = Constant<value = int64[1] {1}>() m = ReduceL1(h, a) p = Div(h, m)"), 21),
    "sum of squares": (on_row("a = Constant<value = int64[1] {1}>() m = ReduceSumSquare(h, a) p = Div(h, m)"), 21),
    "running sum": (on_row("a = Constant<value = int64 {1}>() p = CumSum(h, a)"), 21),
    "running sum, backwards": (on_row("a = Constant<value = int64 {1}>() p = CumSum<reverse=1,exclusive=1>(h, a)"), 21),
    "unit length": (on_row("p = LpNormalization<axis=1>(h)"), 21),
    "average pool": (on_map("p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(h)"), 21),
    "padded average pool": (on_map("p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(h)"), 21),
    "average pool, padding counts": (
        on_map("p = AveragePool<kernel_shape=[3,3], pads=[1,0,1,0], count_include_pad=1>(h)"), 21,
    ),
    "average pool, rounded up": (on_map("p = AveragePool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(h)"), 21),
    "average pool, padded as needed": (
        on_map('p = AveragePool<kernel_shape=[3,3], strides=[2,2], auto_pad="SAME_UPPER">(h)'), 21,
    ),
    "average pool over everything": (on_map("p = AveragePool<kernel_shape=[6,6]>(h)"), 21),
    "largest of a map": (on_map("p = GlobalMaxPool(h)"), 21),
    "nearest": (upsampled('mode="nearest"'), 21),
    "linear": (upsampled('mode="linear"'), 21),
    "linear, corners aligned": (
        upsampled('mode="linear", coordinate_transformation_mode="align_corners"', "1.0, 1.0, 1.5, 2.5"), 21,
    ),
    "cubic, smaller": (upsampled('mode="cubic", antialias=1', "1.0, 1.0, 0.5, 0.7"), 21),
    "to a size": (
        on_map(
            "e = Constant<value = float[0] {}>() c = Constant<value = int64[2] {9, 4}>() "
            'p = Resize<mode="linear", axes=[2,3]>(h, e, e, c)'
        ),
        21,
    ),
    "transposed": (transposed("strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]"), 21),
    "transposed in groups": (transposed("strides=[3,2], group=2, dilations=[1,2]"), 21),
    "transposed, padded as needed": (transposed('strides=[2,2], auto_pad="SAME_UPPER"', "8,6,2,4"), 21),
    "transposed, much padding": (transposed("strides=[2,2], pads=[4,4,4,4]"), 21),
    "depth to space": (on_map("d = DepthToSpace<blocksize=2>(h) p = Concat<axis=1>(d, d, d, d)"), 21),
    "depth to space, columns first": (
        on_map('d = DepthToSpace<blocksize=2, mode="CRD">(h) p = Concat<axis=1>(d, d, d, d)'), 21,
    ),
    "space to depth": (
        "(float[N,3,6,6] x, float[2,3,1,1] w, float[5,8,1,1] v) => (float[N,5,H,W] y)"
        " { h = Conv(x, w) p = SpaceToDepth<blocksize=2>(h) y = Conv(p, v) }",
        21,
    ),
    "einsum": (
        '(float[N,3,6] x, float[6,2,4] w, float[3,4,5] v) => (float[N,2,5,3] y) '
        '{ h = Einsum<equation="nsc,chd->nhsd">(x, w) y = Einsum<equation="...hsd,sde->...hes">(h, v) }',
        21,
    ),
    "einsum, summed alone": (
        '(float[N,3,6] x, float[6,4] w) => (float[4,N] y) { y = Einsum<equation="nsc,cd->dn">(x, w) }', 21,
    ),
    **{
        f"depthwise, {name}": (
            "(float[3,8,5,4] x, float[8,1,3,2] w, float[8] b) => (float[3,8,H,W] y) "
            f"{{ y = Conv<group=8{attributes}>(x, w, b) }}", 21,
        )
        for name, attributes in (
            ("plain", ""),
            ("padded", ", pads=[1, 0, 2, 1]"),
            ("strides and dilations", ", strides=[2, 1], dilations=[1, 2], pads=[1, 1, 1, 1]"),
            ("same, upper", ', auto_pad="SAME_UPPER", strides=[2, 2]'),
            ("same, lower", ', auto_pad="SAME_LOWER"'),
        )
    },
    **{f"fused, {name}": (text, 21) for name, text in FUSED.items()},
    **{
        f"gather, {name}": (
            "(float[4,2] x, float[5,6,3] w) => (float[A,B,C] y) { a = Abs(x) c = Cast<to=7>(a) "
            f"o = Constant<value = int64 {{1}}>() {indices} g = Gather<axis={axis}>(w, i) y = Sin(g) }}", 21,
        )
        for name, indices, axis in (
            ("a matrix of indices", "i = Identity(c)", 0),
            ("in the middle, some from the end", "i = Sub(c, o)", 1),
            ("one", "i = ReduceMax<keepdims=0>(c)", 2),
        )
    },
    "embedding": (
        "(float[4,3] x, float[9,6] w, float[5,6] p, float[2,6] t, float[6] g, float[6] b) => (float[4,3,6] y) "
        "{ a = Abs(x) i = Cast<to=6>(a) k = Constant<value = int32[4,3] {0,0,1,0,1,1,0,0,0,1,1,1}>() "
        "e, n = com.microsoft.EmbedLayerNormalization<epsilon=0.01>(i, k, w, p, t, g, b) y = Sin(e) }", 21,
    ),
    "instance norm": (on_map("p = InstanceNormalization<epsilon=0.01>(h, s, b)"), 21),
    "group norm": (on_map("p = GroupNormalization<num_groups=2>(h, s, b)"), 21),
    "layer norm without bias": (on_row("p = LayerNormalization(h, s)"), 21),
    "root mean square": (on_row("p = RMSNormalization(h, s)"), 23),
    "mean and variance": (on_map("p = MeanVarianceNormalization(h)"), 21),
    "local response": (on_map("p = LRN<size=3, alpha=0.5, beta=0.6, bias=1.1>(h)"), 21),
    **{
        f"cross-entropy, {name}": (
            f"(float[4,6] x, float[6,3] w) => ({output} y) {{ h = MatMul(x, w) l = Constant<value = int64[4] "
            f"{{2, -1, 0, 1}}>() k = Constant<value = float[3] {{0.5, 1.5, 2.0}}>() "
            f"y = SoftmaxCrossEntropyLoss<{attributes}>(h, l{weights}) }}", 21,
        )
        for name, output, attributes, weights in (
            ("some don't count", "float", "ignore_index = -1", ""),
            ("weighted", "float", "ignore_index = -1", ", k"),
            ("weighted sum", "float", 'ignore_index = -1, reduction = "sum"', ", k"),
            ("one by one", "float[4]", 'ignore_index = -1, reduction = "none"', ""),
        )
    },
    "cross-entropy of positions": (
        "(float[2,6,2] x, float[2,3,6] w) => (float y) "
        "{ h = MatMul(w, x) l = Constant<value = int64[2,2] {2, 0, 1, 1}>() "
        "y = SoftmaxCrossEntropyLoss<ignore_index = 0>(h, l) }", 21,
    ),
    "rnn": (recurrent("RNN", 1, 1, ', activations=["Relu"]'), 21),
    "gru": (recurrent("GRU", 3, 1, ""), 21),
    "gru, linear before reset, backwards": (recurrent("GRU", 3, 1, ', linear_before_reset=1, direction="reverse"'), 21),
    "gru, both ways, without biases": (recurrent("GRU", 3, 2, ', direction="bidirectional"', "x, w, r"), 21),
    "lstm": (recurrent("LSTM", 4, 1, ""), 21),
    "lstm, both ways": (recurrent("LSTM", 4, 2, ', direction="bidirectional"'), 21),
}  # fmt: skip


class Erf(OpRun):
    """The evaluator's own computes in single precision."""

    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (np.asarray(erf(x)),)


class Gelu(OpRun):
    """As `Erf`."""

    op_domain = ""

    def _run(self, x: np.ndarray, approximate: str | None = None) -> tuple[np.ndarray]:
        assert approximate in (None, "none")
        return (0.5 * x * (1 + erf(x * np.sqrt(0.5))),)


def case(name: str) -> tuple[ir.Model, Dataset]:
    text, opset = ROWS[name]
    model = graph(text, opset=opset)
    return model, Dataset(random_inputs(model, seed=1, batch=4), None)


@pytest.mark.parametrize("name", ROWS)
def test_a_lowered_graph_computes_the_same(name: str) -> None:
    model, data = case(name)
    expected = run_model(model, data.inputs)
    sizes = {name: array.shape for name, array in data.inputs.items()}
    lowered, _ = evaluation_graph(model, plan_loss(model, data), sizes)
    for before, after in zip(expected, run_model(lowered, data.inputs), strict=True):
        assert relative_difference(before, after) < 1e-5


CODE = """
import sys, traceback
from pathlib import Path
from onnxprune.training import worker
modules = worker.import_runtime()
for each in map(Path, sys.argv[1:]):
    if (each / "failure").exists():
        continue
    try:
        worker.Trainer(each, *modules).measure()
    except Exception:
        (each / "failure").write_text(traceback.format_exc())
"""


@pytest.fixture(scope="module", params=["ort", "graph", "cuda"])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of all rows, in which one worker process left the gradients of the distillation loss.

    What is made for a GPU is run on the CPU here.
    """
    folder, runtime = tmp_path_factory.mktemp("rows"), find_runtime()
    folders = {name: folder / str(index) for index, name in enumerate(ROWS)}
    for name, place in folders.items():
        model, data = case(name)
        options = TrainingOptions(request.param, batch=len(data), threads=1, loss=Loss(features=0.0))
        try:
            client._prepare(model, shifted(model), data, place, options, {"task": "gradients"})
            job = json.loads((place / "job.json").read_text())
            (place / "job.json").write_text(json.dumps({**job, "gpu": False}))
        except TrainingError as error:
            (place / "failure").write_text(str(error))
    path = os.pathsep.join([str(runtime)] * (request.param == "ort") + [str(ROOT)])
    command = [sys.executable, "-P", "-c", CODE, *map(str, folders.values())]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=True, cwd=folder)
    return folders


def shifted(model: ir.Model) -> ir.Model:
    """A teacher whose weights are others."""
    teacher = model.clone()
    for index, name in enumerate(trainable(model)):
        value = teacher.graph.initializers[name]
        array = value.const_value.numpy()  # type: ignore[union-attr]
        noise = np.random.default_rng(index).standard_normal(array.shape)
        value.const_value = ir.tensor((array + 0.3 * noise).astype(np.float32), name=name)
    return teacher


def loss_in_double(model: ir.Model, data: Dataset, changed: dict[str, np.ndarray], wanted: list[np.ndarray]) -> float:
    """The mean over outputs of the square error over the mean square of what is wanted, everything in float64."""
    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        array = changed.get(tensor.name, onnx.numpy_helper.to_array(tensor))
        if array.dtype in (np.float32, np.float64):
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float64), tensor.name))
    for node in proto.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.DOUBLE
    evaluator: Any = ReferenceEvaluator(proto, new_ops=[Erf, Gelu])
    found = evaluator.run(None, {name: array.astype(np.float64) for name, array in data.inputs.items()})
    return float(np.mean([((f - w) ** 2).mean() / ((w**2).mean() + 1e-6) for f, w in zip(found, wanted, strict=True)]))


@needs_training
@pytest.mark.parametrize("name", ROWS)
def test_gradients_equal_finite_differences(name: str, measured: dict[str, Path]) -> None:
    model, data = case(name)
    wanted = [array.astype(np.float64) for array in run_model(shifted(model), data.inputs)]
    failure = measured[name] / "failure"
    assert not failure.exists(), failure.read_text()
    gradients = dict(np.load(measured[name] / "result.npz"))
    assert gradients
    # in place of the model, since the reference evaluator lacks some of its operators; the test above compares them
    sizes = {name: array.shape for name, array in data.inputs.items()}
    lowered, _ = evaluation_graph(model, plan_loss(model, data), sizes)
    for parameter, (gradient, _) in gradients.items():
        value = model.graph.initializers[parameter].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
        direction = np.random.default_rng(len(parameter)).standard_normal(value.shape)
        step = 1e-6
        up, down = (
            loss_in_double(lowered, data, {parameter: value + sign * step * direction}, wanted) for sign in (1, -1)
        )
        slope, size = float((gradient * direction).sum()), float(np.abs(gradient * direction).sum())
        assert slope == pytest.approx((up - down) / (2 * step), abs=1e-4 * size + 1e-7)


UNTRAINABLE = {
    "lengths of their own": (
        "(float[7,4,6] x, float[1,20,6] w, float[1,20,5] r, int32[4] lengths) => (float[1,4,5] z) "
        "{ y, z = LSTM<hidden_size=5>(x, w, r, , lengths) }",
        ("x", "lengths"),
    ),
    "clip": (recurrent("GRU", 3, 1, ", clip=1.0"), ("x",)),
}


@pytest.mark.parametrize("name", UNTRAINABLE)
def test_what_cannot_be_lowered_is_named(name: str) -> None:
    text, inputs = UNTRAINABLE[name]
    model = graph(text, inputs)
    data = Dataset({k: np.abs(v) for k, v in random_inputs(model, seed=0).items()}, None)
    with pytest.raises(
        TrainingError, match=r"nothing in the model can be fine-tuned: node '.*can't be fine-tuned: .*--epochs 0"
    ):
        training_graph(model, plan_loss(model, data), {name: array.shape for name, array in data.inputs.items()})
