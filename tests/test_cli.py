"""The command line as a user drives it: results, JSON, exit statuses, and every kind of bad input."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxprune.cutting.plan import load_plan
from onnxprune.cutting.verify import mask_oracle
from onnxprune.graph.model import open_model, save_model
from onnxprune.training import supported
from tests.conftest import MODELS, call, needs_training, start
from tests.graphs import graph, proto

DIGITS, TEST = MODELS / "digits.npz", MODELS / "digits_test.npz"
CHOSEN = ("--criterion", "flap", "--scope", "gradual")  # where a test is of something else


def accuracy(path: Path) -> float:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with np.load(TEST) as data:
        return float((session.run(None, {"input": data["input"]})[0].argmax(1) == data["labels"]).mean() * 100)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@needs_training
@pytest.mark.parametrize("name", ["digits_resnet", "digits_mlp", "digits_vit", "digits_gru"])
def test_half_of_the_macs_within_a_point(name: str, tmp_path: Path) -> None:
    model = MODELS / f"{name}.onnx"
    before = digest(model)
    out = tmp_path / "out.onnx"
    result = call(
        "run", model, "-o", out, "--data", DIGITS, "--eval-data", TEST, "--target-macs", 0.5, "--json", cwd=tmp_path
    )
    assert result.status == 0, result.err
    report = json.loads((tmp_path / "out.onnxprune" / "report.json").read_text())
    assert result.json["pruned"] == report["pruned"] and result.json["exit_status"] == 0
    assert report["pruned"]["macs"] <= 0.5 * report["baseline"]["macs"]
    assert digest(model) == before
    # The report's figures, found again with plain onnxruntime and onnx.
    for side, path in (("baseline", model), ("pruned", out)):
        assert report[side]["metric"] == {"name": "top1", "value": pytest.approx(accuracy(path))}
        assert report[side]["size_bytes"] == path.stat().st_size
    weights = onnx.load(str(tmp_path / "out.onnxprune" / "round-01" / "candidate.onnx")).graph.initializer
    trained = [t for t in weights if t.data_type == onnx.TensorProto.FLOAT and ".fill" not in t.name]  # no zero states
    floats = sum(int(np.prod(t.dims)) for t in trained if t.dims)
    assert report["pruned"]["params"] == floats
    assert accuracy(out) >= accuracy(model) - 1
    onnx.checker.check_model(str(out), full_check=True)
    assert set(report["pruned"]["latency_ms"]["CPUExecutionProvider"]) == {"median", "p90", "runs"}
    plan = load_plan(tmp_path / "out.onnxprune" / "plan.json")
    baseline = onnx.load(str(tmp_path / "out.onnxprune" / "baseline.onnx"))
    assert set(plan.tensors) <= {name for node in baseline.graph.node for name in node.output}


@needs_training
def test_an_allowed_drop_alone_decides(tmp_path: Path) -> None:
    result = call(
        "run", MODELS / "digits_mlp.onnx", "-o", "out.onnx", "--data", DIGITS, "--eval-data", TEST, "--max-drop", 1,
        "--epochs", 5, "--rounds", 2, "--json", cwd=tmp_path,
    )  # fmt: skip
    assert result.status == 0, result.err
    report = result.json
    assert report["pruned"]["macs"] < 0.9 * report["baseline"]["macs"]
    assert report["target"]["drop"] <= 1
    assert accuracy(tmp_path / "out.onnx") >= accuracy(MODELS / "digits_mlp.onnx") - 1
    assert [round_["tau"] for round_ in report["rounds"]]


def test_without_data_accuracy_is_said_to_be_unmeasured(tmp_path: Path) -> None:
    result = call("run", MODELS / "digits_mlp.onnx", "-o", "out.onnx", cwd=tmp_path)
    assert result.status == 0
    assert "accuracy was not measured" in result.err and "not measured" in result.out
    report = json.loads((tmp_path / "out.onnxprune" / "report.json").read_text())
    assert report["pruned"]["metric"] is None and 0 < report["pruned"]["fidelity"]["fidelity"] < 1
    assert report["pruned"]["macs"] <= 0.75 * report["baseline"]["macs"]
    assert any("on noise" in note for note in report["notes"])


def test_models_that_read_tokens_are_cut_without_data_and_not_fitted(tmp_path: Path) -> None:
    text = """(int64[N,5] x, float[9,8] e, float[8,12] v, float[12,3] w) => (float[N,5,3] y)
    { h = Gather(e, x) a = MatMul(h, v) r = Relu(a) y = MatMul(r, w) }"""
    save_model(graph(text), tmp_path / "tokens.onnx")
    result = call("run", "tokens.onnx", "-o", "out.onnx", "--json", cwd=tmp_path)
    assert result.status == 0, result.err
    assert any("nothing was fitted" in note for note in result.json["notes"])
    run = tmp_path / "out.onnxprune"
    found = mask_oracle(
        open_model(run / "baseline.onnx"), open_model(run / "pruned.onnx"), load_plan(run / "plan.json")
    )
    assert found.exact and found.difference < 1e-5


@needs_training
def test_unlabelled_data_is_enough(tmp_path: Path) -> None:
    with np.load(DIGITS) as data:
        np.savez(tmp_path / "calibration.npz", images=data["input"][:400])
    result = call(
        "run", MODELS / "digits_mlp.onnx", "-o", "out.onnx", "--data", "calibration.npz", "--target-params", 0.6,
        "--epochs", 20, "--json", cwd=tmp_path,
    )  # fmt: skip
    assert result.status == 0, result.err
    assert result.json["pruned"]["metric"]["name"] == "fidelity"
    assert result.json["pruned"]["params"] <= 0.6 * result.json["baseline"]["params"]
    assert result.json["pruned"]["metric"]["value"] > 97


@pytest.mark.parametrize("name", ["digits_resnet", "digits_mlp", "digits_vit", "digits_gru"])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_prune_writes_what_passes_the_oracle(name: str, ratio: float, tmp_path: Path) -> None:
    result = call(
        "prune", MODELS / f"{name}.onnx", "-o", "out.onnx", "--ratio", ratio, "--plan", "plan.json", "--baseline",
        "base.onnx", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert result.status == 0, result.err
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    plan = load_plan(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["model_sha256"] == digest(tmp_path / "base.onnx")
    found = mask_oracle(open_model(tmp_path / "base.onnx"), open_model(tmp_path / "out.onnx"), plan)
    assert np.isfinite(found.difference)
    assert plan.exact == (name in ("digits_resnet", "digits_mlp")) == result.json["exact"]
    assert not plan.exact or found.difference < 1e-5


@needs_training
def test_a_run_that_is_killed_at_any_moment_resumes_to_the_same_result(tmp_path: Path) -> None:
    arguments = [
        "run", MODELS / "digits_resnet.onnx", "-o", "out.onnx", "--data", DIGITS, "--eval-data", TEST, "--max-drop", 2,
        "--rounds", 2, "--epochs", 4, *CHOSEN[:2],
    ]  # fmt: skip
    (tmp_path / "whole").mkdir()
    assert call(*arguments, cwd=tmp_path / "whole").status == 0
    folder = tmp_path / "killed"
    folder.mkdir()
    resume: list[str] = []
    for seconds in (2.5, 4.0, 5.5, 7.0):
        process = start(*arguments, *resume, cwd=folder)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        resume = ["--resume"] if (folder / "out.onnxprune" / "config.json").exists() else []
    result = call(*arguments, *resume, cwd=folder)
    assert result.status == 0, result.err
    assert digest(folder / "out.onnx") == digest(tmp_path / "whole" / "out.onnx")
    assert (folder / "out.onnxprune" / "plan.json").read_text() == (
        tmp_path / "whole" / "out.onnxprune" / "plan.json"
    ).read_text()


@needs_training
def test_interrupting_leaves_the_best_accepted_model(tmp_path: Path) -> None:
    process = start(
        "run", MODELS / "digits_mlp.onnx", "-o", "out.onnx", "--data", DIGITS, "--eval-data", TEST, "--max-drop", 3,
        "--rounds", 4, "--epochs", 60, cwd=tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (tmp_path / "out.onnxprune" / "round-02").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "out.onnx" in err and "--resume" in err
    assert accuracy(tmp_path / "out.onnx") >= accuracy(MODELS / "digits_mlp.onnx") - 3
    assert not subprocess.run(["pgrep", "-f", f"training.worker {tmp_path}"], capture_output=True, check=False).stdout


def bad_model(path: Path, kind: str) -> Path:
    content = (MODELS / "digits_mlp.onnx").read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "not onnx":
        path.write_bytes(b"PNG or something")
    elif kind == "custom operator":
        model = onnx.load_from_string(content)
        model.graph.node[0].domain = "my.company"
        model.opset_import.append(onnx.helper.make_opsetid("my.company", 1))
        path.write_bytes(model.SerializeToString())
    elif kind == "nothing to prune":
        path.write_bytes(
            proto("(float[N,6] x, float[6,4] w) => (float[N,4] y) { y = MatMul(x, w) }").SerializeToString()
        )
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such file"),
        ("truncated", "truncated"),
        ("not onnx", "not an ONNX model"),
        ("custom operator", "my.company"),
        ("nothing to prune", "nothing can be pruned"),
    ],
)
def test_models_that_cannot_be_used(kind: str, message: str, tmp_path: Path) -> None:
    model = bad_model(tmp_path / "model.onnx", kind)
    for command in (["run", model, "-o", "out.onnx"], ["prune", model, "-o", "out.onnx", "--ratio", "0.5"]):
        result = call(*command, cwd=tmp_path)
        assert result.status == 3, result.err
        assert message in result.err
        assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"picture": np.zeros((4, 1, 8, 8), np.float32)}, "'input'"),
        ({"input": np.zeros((4, 1, 8, 9), np.float32)}, "shape"),
        ({"input": np.zeros((4, 1, 8, 8), np.int32)}, "int32"),
        ({"input": np.zeros((4, 1, 8, 8), np.float32), "labels": np.arange(4) + 8}, "'labels'"),
        ({"input": np.zeros((0, 1, 8, 8), np.float32)}, "no samples"),
        ({"input": np.full((4, 1, 8, 8), np.nan, np.float32)}, "NaN"),
    ],
)
def test_data_that_cannot_be_used(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    result = call("run", MODELS / "digits_mlp.onnx", "-o", "out.onnx", "--data", "data.npz", "--json", cwd=tmp_path)
    assert result.status == 4
    assert message in result.err
    assert result.json["exit_status"] == 4 and message in result.json["error"]
    assert not (tmp_path / "out.onnx").exists() and not (tmp_path / "out.onnxprune").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "MODEL"),
        (["run", "MODEL", "--target-macs", "2"], "between 0 and 1"),
        (["run", "MODEL", "--max-drop", "1"], "--data"),
        (["run", "MODEL", "--ep", "warp"], "cpu"),
        (["run", "MODEL", "-o", "MODEL"], "is the input"),
        (["run", "MODEL", "-o", "nowhere/out.onnx"], "nowhere"),
        (["run", "MODEL", "--round-to", "none"], "round-to"),
        (["run", "MODEL", "--resume", "-o", "out.onnx"], "no run to resume"),
        (["run", "MODEL", "--data", "DATA", "--metric", "bleu"], "bleu"),
        (["prune", "MODEL", "-o", "out.onnx", "--ratio", "1.5"], "between 0 and 1"),
        (["prune", "MODEL", "-o", "out.onnx", "--ratio", "0.5", "--criterion", "taste"], "taste"),
        (["prune", "MODEL", "-o", "out.onnx", "--ratio", "0.5", "--plan", "out.onnx"], "another output"),
        (["run", "MODEL", "-o", "DATA", "--data", "DATA"], "is the input"),
        (["run", "OLD", "-o", "old.onnx"], "lies in the run folder"),
        (["run", "MODEL", "-o", "out.onnx", "--run-dir", "old.onnxprune"], "not a run folder"),
        (["run", "MODEL", "-o", "out.onnx", "--run-dir", "plan.json"], "not a run folder"),
        (["run", "MODEL", "-o", "out.onnx", "--run-dir", "old.onnxprune", "--resume"], "no run to resume"),
        (["run", "MODEL", "--data", "DATA", "--freeze", "nix"], "no parameter has such a name"),
        (["run", "MODEL", "--data", "DATA", "--mean", "0.5"], "folders of images"),
        (["export", "MODEL", "-o", "MODEL"], "is the input"),
        (["sensitivity", "MODEL", "--data", "DATA", "-o", "MODEL"], "is the input"),
        (["sensitivity", "MODEL", "--data", "DATA", "--plot", "picture.foo"], ".svg"),
        (["apply", "PLAN", "MODEL", "-o", "PLAN"], "is the input"),
        (["apply", "PLAN", "MODEL", "-o", "out.onnx"], "plan.json: not a plan"),
        (["bench", "MODEL", "--target", "script:old.onnxprune"], "not from an earlier benchmark"),
        (["bench"], "MODELS"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_usage(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "old.onnxprune").mkdir()
    (tmp_path / "old.onnxprune" / "config.json").write_text('{"architectures": ["BertModel"]}')
    places = {}
    for name, file, source in (
        ("MODEL", "model.onnx", MODELS / "digits_mlp.onnx"),
        ("OLD", "old.onnxprune/old.onnx", MODELS / "digits_mlp.onnx"),
        ("DATA", "data.npz", DIGITS),
        ("PLAN", "plan.json", tmp_path / "old.onnxprune" / "config.json"),
    ):
        places[name] = Path(shutil.copy(source, tmp_path / file))
    before = {path: digest(path) for path in tmp_path.rglob("*") if path.is_file()}
    result = call(*[places.get(argument, argument) for argument in arguments], cwd=tmp_path)
    assert result.status == 2, result.err
    assert message in result.err
    assert {path: digest(path) for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_output_folder_without_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    result = call("run", MODELS / "digits_mlp.onnx", "-o", folder / "out.onnx", cwd=tmp_path)
    assert result.status == 2 and "permission" in result.err


def on_a_full_disk(limit: int, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A limit on the size of files stands in for the disk: writes fail with an OSError as they do on a full one."""
    command = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); import signal;"
    command += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from onnxprune.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    model = MODELS / "digits_mlp.onnx"
    done = on_a_full_disk(50_000, "prune", model, "-o", "out.onnx", "--ratio", "0.1", cwd=tmp_path)
    assert done.returncode == 2 and "can't write" in done.stderr
    assert list(tmp_path.iterdir()) == []


@needs_training
@pytest.mark.parametrize(("model", "limit"), [("digits_gru", 200_000), ("digits_resnet", 500_000)])
def test_a_disk_that_is_full_in_training_ends_the_run_with_the_reason(model: str, limit: int, tmp_path: Path) -> None:
    """In the first case the data doesn't fit, in the second the worker's checkpoint."""
    data = np.load(MODELS / "digits.npz")
    few = slice(0, None if model == "digits_gru" else 300)
    np.savez(tmp_path / "data.npz", **{name: data[name][few] for name in data.files})
    words = ["-o", "out.onnx", "--data", "data.npz", "--target-macs", 0.5, "--epochs", 2, *CHOSEN]
    done = on_a_full_disk(limit, "run", MODELS / f"{model}.onnx", *words, cwd=tmp_path)
    assert done.returncode == 6 and "training failed (disk)" in done.stderr, done.stderr
    assert not (tmp_path / "out.onnx").exists()


def test_a_target_that_cannot_be_met_still_writes_the_best_accepted_model(tmp_path: Path) -> None:
    result = call(
        "run", MODELS / "digits_mlp.onnx", "-o", "out.onnx", "--data", DIGITS, "--eval-data", TEST, "--target-macs",
        0.2, "--max-drop", 0.5, "--epochs", 0, "--rounds", 2, "--json", cwd=tmp_path,
    )  # fmt: skip
    assert result.status == 5, result.err
    assert "not met" in result.err and "asked 20.0 %" in result.err
    assert result.json["exit_status"] == 5 and not result.json["target"]["met"]
    assert any(not record["accepted"] for record in result.json["rounds"])
    assert accuracy(tmp_path / "out.onnx") >= accuracy(MODELS / "digits_mlp.onnx") - 0.5


def test_training_that_is_not_available_says_what_works_without(tmp_path: Path) -> None:
    cache = {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "HOME": str(tmp_path),
        "PIP_FIND_LINKS": "",
    }
    arguments = ["run", MODELS / "digits_mlp.onnx", "-o", "out.onnx", "--data", DIGITS, "--target-macs", 0.8, *CHOSEN]
    result = call(*arguments, "--trainer", "ort", cwd=tmp_path, **cache)
    assert result.status == 6, result.err
    assert "--epochs 0" in result.err
    assert not (tmp_path / "out.onnx").exists()
    assert call(*arguments, "--epochs", 0, "--overwrite", cwd=tmp_path, **cache).status == 0
    other = call(*arguments, "--epochs", 1, "--overwrite", cwd=tmp_path, **cache)
    assert other.status == 0 and "as by --trainer graph" in other.err, other.err


def test_inspect_says_what_can_go_and_why_the_rest_stays(tmp_path: Path) -> None:
    found = call("inspect", MODELS / "digits_vit.onnx", "--json", cwd=tmp_path).json
    assert sorted(group["units"] for group in found["groups"]) == [4, 4, 4, 64, 192, 192, 192]
    assert any("output" in lock["reason"] for lock in found["locks"])
    assert 0.9 < found["reachable"]["params"] <= 1
    assert "groups that can be pruned" in call("inspect", MODELS / "digits_vit.onnx", cwd=tmp_path).out


def test_bench_compares_models(tmp_path: Path) -> None:
    result = call(
        "bench", MODELS / "digits_resnet.onnx", MODELS / "digits_mlp.onnx", "--seconds", 0.3, "--json", cwd=tmp_path
    )
    first, second = result.json["results"]
    assert first["against_first"]["speedup"] == 1 and second["latency"]["median"] > 0


def test_doctor(tmp_path: Path) -> None:
    found = call("doctor", "--json", cwd=tmp_path).json
    assert "CPUExecutionProvider" in found["execution_providers"]
    assert found["training_runtime"]["supported"] == supported()


def test_help_and_version(tmp_path: Path) -> None:
    for command in ([], ["run"], ["prune"], ["inspect"], ["bench"], ["doctor"]):
        assert call(*command, "--help", cwd=tmp_path).status == 0
    assert "onnxprune" in call("--version", cwd=tmp_path).out


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys; from onnxprune.cli import call; call(['--help']); print(sorted(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    loaded = eval(found.stdout.splitlines()[-1])
    assert not {"numpy", "onnx", "onnx_ir", "onnxruntime", "scipy", "sympy", "onnxsim"}.intersection(loaded)
    assert all(name in found.stdout for name in ("run", "prune", "inspect", "doctor"))


def test_a_plan_is_applied_to_other_weights_and_verified(tmp_path: Path) -> None:
    """The same architecture with other numbers is cut the same way; the oracle agrees, and tells a wrong model."""
    other = onnx.load(str(MODELS / "digits_vit.onnx"))
    rng = np.random.default_rng(0)
    for tensor in other.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.dims:
            array = onnx.numpy_helper.to_array(tensor)
            noise = rng.standard_normal(array.shape).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array + 0.05 * noise, tensor.name))
    onnx.save(other, str(tmp_path / "other.onnx"))
    first = ("prune", MODELS / "digits_vit.onnx", "-o", "a.onnx", "--plan", "a.json", "--baseline", "a0.onnx")
    assert call(*first, "--ratio", 0.5, "--layers", 2, cwd=tmp_path).status == 0
    again = ("apply", "a.json", "other.onnx", "-o", "b.onnx", "--plan", "b.json", "--baseline", "b0.onnx", "--json")
    done = call(*again, cwd=tmp_path)
    assert done.status == 0, done.err
    plans = [json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")]
    assert plans[0]["tensors"] == plans[1]["tensors"] and plans[0]["layers"] == plans[1]["layers"]
    good = call("verify", "b0.onnx", "b.onnx", "b.json", "--json", cwd=tmp_path)
    assert good.status == 0 and good.json["comparable"] and good.json["difference"] < 1e-5
    wrong = call("verify", "b0.onnx", "a.onnx", "b.json", "--json", cwd=tmp_path)
    assert wrong.status == 8 and not wrong.json["passed"]
    mixed = call("verify", "b0.onnx", "a.onnx", "a.json", cwd=tmp_path)
    assert mixed.status == 2 and "another baseline" in mixed.err
    misfit = call("apply", "a.json", MODELS / "digits_mlp.onnx", "-o", "c.onnx", cwd=tmp_path)
    assert misfit.status in (2, 3) and "Traceback" not in misfit.err and not (tmp_path / "c.onnx").exists()


@pytest.mark.parametrize("kind", ["residual", "head", "qk", "width"])
def test_kinds_of_a_transformer_are_cut_one_by_one(kind: str, tmp_path: Path) -> None:
    arguments = ("prune", MODELS / "digits_vit.onnx", "-o", "out.onnx", "--ratio", 0.5, "--kinds", kind, "--json")
    done = call(*arguments, cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.json["compared"] and done.json["pruned"]["params"] < 0.95 * done.json["baseline"]["params"]
    assert done.json["exact"] is (kind != "residual")


def test_kinds_that_are_not_there(tmp_path: Path) -> None:
    unknown = call("prune", MODELS / "digits_mlp.onnx", "-o", "o.onnx", "--ratio", 0.5, "--kinds", "wing", cwd=tmp_path)
    assert unknown.status == 2 and "residual" in unknown.err
    absent = call("prune", MODELS / "digits_mlp.onnx", "-o", "o.onnx", "--ratio", 0.5, "--kinds", "head", cwd=tmp_path)
    assert absent.status == 3 and "width" in absent.err


def test_layers_alone_are_dropped(tmp_path: Path) -> None:
    arguments = ("prune", MODELS / "digits_vit.onnx", "-o", "out.onnx", "--ratio", 0, "--layers", 3, "--plan", "p.json")
    done = call(*arguments, "--json", cwd=tmp_path)
    assert done.status == 0, done.err
    assert done.json["exact"] and done.json["pruned"]["params"] < done.json["baseline"]["params"]
    assert len(json.loads((tmp_path / "p.json").read_text())["layers"]) == 3
    many = call("prune", MODELS / "digits_vit.onnx", "-o", "o.onnx", "--ratio", 0.5, "--layers", 99, cwd=tmp_path)
    assert many.status == 2 and "6 layers" in many.err


def test_shares_that_stay_can_be_set_by_name(tmp_path: Path) -> None:
    model = MODELS / "digits_mlp.onnx"
    groups = call("inspect", model, "--json", cwd=tmp_path).json["groups"]
    name, units = groups[0]["name"], groups[0]["units"]
    for command in ("prune", "run"):
        wanted = ("--ratio", 0.5) if command == "prune" else ("--target-macs", 0.4)
        arguments = (command, model, "-o", "o.onnx", *wanted, "--keep", f"{name}=0.75:0.75", "--round-to", 1, "--json")
        result = call(*arguments, cwd=tmp_path)
        assert result.status == 0, result.err
        after = {each.name: tuple(each.dims) for each in onnx.load(str(tmp_path / "o.onnx")).graph.initializer}
        assert 0.75 * units in after[name]
    for wrong in ("wing*=0.5", "0.5", f"{name}=much", f"{name}=0.9:0.1"):
        assert call("prune", model, "-o", "no.onnx", "--ratio", 0.5, "--keep", wrong, cwd=tmp_path).status == 2
    assert not (tmp_path / "no.onnx").exists()


def test_what_is_protected_keeps_its_shape(tmp_path: Path) -> None:
    model = MODELS / "digits_resnet.onnx"
    wanted = ("--protect", "blocks.0.*", "--protect", "*.skip.?.weight")
    result = call("prune", model, "-o", "o.onnx", "--ratio", 0.5, *wanted, cwd=tmp_path)
    unknown = call("prune", model, "-o", "no.onnx", "--ratio", 0.5, "--protect", "wing*", cwd=tmp_path)
    everything = call("run", model, "-o", "no.onnx", "--protect", "*", cwd=tmp_path)
    assert result.status == 0, result.err
    assert unknown.status == 2 and "wing*" in unknown.err
    assert everything.status == 3 and "protect" in everything.err
    assert not (tmp_path / "no.onnx").exists()
    before, after = (
        {each.name: tuple(each.dims) for each in onnx.load(str(path)).graph.initializer}
        for path in (model, tmp_path / "o.onnx")
    )
    kept = [name for name in before if name.startswith("blocks.0.") or ".skip." in name]
    assert kept and all(after[name] == before[name] for name in kept if name in after)
    assert sum(map(np.prod, after.values())) < 0.9 * sum(map(np.prod, before.values()))


def test_criteria_are_tried_and_the_best_is_kept(tmp_path: Path) -> None:
    arguments = (
        "run",
        MODELS / "digits_mlp.onnx",
        "--criterion",
        "auto",
        "--scope",
        "layer",
        "--target-macs",
        0.4,
        "--epochs",
        0,
        "--json",
    )
    result = call(*arguments, "--data", DIGITS, "--eval-data", TEST, "-o", "o.onnx", cwd=tmp_path)
    assert result.status == 0, result.err
    contest = result.json["contest"]
    assert set(contest) == {"obs, layer", "flap, layer", "l2, layer"}
    best = min(contest, key=contest.get).split(", ")[0]
    named = call(
        *arguments[:3], best, *arguments[4:], "--data", DIGITS, "--eval-data", TEST, "-o", "n.onnx", cwd=tmp_path
    )
    rounds = [each["rounds"][0] for each in (result.json, named.json)]
    assert rounds[0]["widths"] == rounds[1]["widths"] and best in result.err
    without = call(*arguments, "-o", "without.onnx", cwd=tmp_path)
    assert without.status == 0 and not without.json["contest"], without.err


def test_two_scopes_are_tried_and_the_better_is_kept(tmp_path: Path) -> None:
    arguments = ("run", MODELS / "digits_resnet.onnx", "--target-macs", 0.15, "--epochs", 0, "--json", "--data", DIGITS,
                 "--criterion", "l2", "--eval-data", TEST, "-o", "o.onnx")  # fmt: skip
    result = call(*arguments, cwd=tmp_path)
    assert result.status == 0, result.err
    contest = result.json["contest"]
    assert set(contest) == {"l2, gradual", "l2, priced", "l2, priced, with layers"}
    best = min(contest, key=contest.get).split(", ")[1]
    rounds = [
        each["rounds"][0] for each in (result.json, call(*arguments, "--scope", best, "--overwrite", cwd=tmp_path).json)
    ]
    assert rounds[0]["widths"] == rounds[1]["widths"]
