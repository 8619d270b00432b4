"""`onnxprune run`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from onnxprune.choosing.threshold import CONTROLLERS, INITIAL, MOVES
from onnxprune.cli.options import (
    IMAGE_OPTIONS,
    KEEP_OPTION,
    KINDS_OPTION,
    LAYERS_OPTION,
    PROTECT_OPTION,
    ROUND_TO,
    WeightType,
    image_options,
    options,
    with_json,
)
from onnxprune.cli.output import TerminalListener, print_json, say, show
from onnxprune.cli.tables import report_tables
from onnxprune.errors import UsageError
from onnxprune.evaluating.metrics import NAMES
from onnxprune.exporting.quantise import NUMBERS
from onnxprune.running.options import RunOptions
from onnxprune.running.pipeline import run
from onnxprune.running.report import Report, decimals
from onnxprune.running.trials import DATA_CRITERIA
from onnxprune.scoring.score import CRITERIA, SCOPES
from onnxprune.training.losses import DISTANCE_KINDS, KINDS

RUN_OPTIONS = [
    click.option(
        "-o", "--output", type=click.Path(path_type=Path), help="The pruned model.  [default: MODEL.pruned.onnx]"
    ),
    click.option(
        "--data",
        multiple=True,
        help="Calibration and training data: .npz, folder of images, or module:function; repeatable.",
    ),
    click.option(
        "--eval-data",
        multiple=True,
        help="Data to measure on; without it a part of --data is held back; repeatable.",
    ),
    click.option("--target-macs", type=float, metavar="F", help="Share of the MACs that may remain, such as 0.5."),
    click.option("--target-params", type=float, metavar="F", help="Share of the parameters that may remain."),
    click.option("--target-size", type=float, metavar="F", help="Share of the bytes of the weights that may remain."),
    click.option("--target-units", type=float, metavar="F", help="Share of all units that may remain."),
    click.option(
        "--target-latency",
        type=float,
        metavar="F",
        help="Share of the measured time that may remain, on the first --ep.",
    ),
    click.option(
        "--max-drop",
        metavar="P|P%",
        help="What may be lost: points of the metric (of errors, their own unit), or P% of the uncut model's.  "
        "[default: 1 point without a target; of errors a hundredth of what the best constant has more]",
    ),
    click.option(
        "--floor",
        type=float,
        default=0.5,
        metavar="F",
        help="Nothing is written below this share of what the uncut model has above guessing (exit status 7).",
    ),
    click.option("--force", is_flag=True, help="Write the result even below the floor."),
    click.option(
        "--weigh",
        multiple=True,
        type=WeightType(),
        metavar="OUTPUT=F",
        help="The weight of an output in fidelity, without labels; repeatable.  [default: 1]",
    ),
    click.option(
        "--rounds", type=int, metavar="N", help="Rounds of cutting and tuning.  [default: 1 to a target, else 6]"
    ),
    click.option(
        "--criterion",
        type=click.Choice([*CRITERIA, *DATA_CRITERIA, "auto"]),
        default="auto",
        help="How units are scored; auto, with data, is obs, flap or l2: what has the lowest loss after repair.",
    ),
    click.option(
        "--scope",
        type=click.Choice([*SCOPES, "priced", "auto"]),
        default="auto",
        help="What units are compared with; priced: by cuts of each group and layer that are measured. "
        "auto is gradual or priced: what has the lowest loss after repair.",
    ),
    click.option(
        "--granularity",
        type=click.Choice(["auto", "rows", "columns"]),
        default="auto",
        help="Heads and groups: whole (rows) or thinner (columns).",
    ),
    KINDS_OPTION,
    PROTECT_OPTION,
    KEEP_OPTION,
    LAYERS_OPTION,
    click.option(
        "--layer-norm",
        metavar="P[:F]",
        help="Layers go by the norm (1, 2 or inf) of their weights: by size and under tau, or under the share F of the "
        "largest one's, such as 2:0.01.",
    ),
    click.option("--prior", metavar="FILE", help="What 'sensitivity -o' wrote: groups are weighed by what they cost."),
    click.option(
        "--round-to", type=ROUND_TO, default="auto", metavar="N|auto", help="Widths are rounded up to a multiple."
    ),
    click.option(
        "--metric", metavar="NAME", help=f"{', '.join(NAMES)}.  [default: top1, mse or fidelity, by the labels]"
    ),
    click.option(
        "--controller",
        type=click.Choice(CONTROLLERS),
        default="bisect",
        help="How the threshold moves when --max-drop decides: by cuts that are measured, or by the published rule, "
        "anchored to the first threshold or recursive, as printed or as its text says.",
    ),
    click.option(
        "--initial-tau",
        metavar="RULE",
        default="deviation",
        help=f"For the published rules: the first threshold; {', '.join(INITIAL)} of the scores, one of them and "
        "a rate (mean:0.1), or a number.",
    ),
    click.option(
        "--alpha", type=float, default=0.9, metavar="F", help="For the published rules: how slowly tau moves."
    ),
    click.option(
        "--moves",
        default=",".join(MOVES),
        metavar="M[,M…]",
        callback=lambda ctx, param, value: tuple(each for each in value.split(",") if each),
        help="What moves the threshold: what rounds cost, gaps in the scores, measured prices of groups and layers.",
    ),
    click.option(
        "--schedule",
        type=click.Choice(["even", "cubic"]),
        default="even",
        help="Steps of the rounds to a target: equal, or the largest first.",
    ),
    click.option(
        "--ep", multiple=True, default=("cpu",), metavar="NAME", help="Execution providers to benchmark on; repeatable."
    ),
    click.option(
        "--quantize",
        type=click.Choice(NUMBERS),
        help="Smaller numbers in the end; dynamic is for transformers.",
    ),
    click.option("--threads", type=int, metavar="N", help="Threads of onnxruntime and of training."),
    click.option("--memory", type=int, metavar="MB", help="What repair may hold beside the models.  [default: 2048]"),
    click.option("--seed", type=int, default=0, metavar="N", help="Decides everything random."),
    click.option(
        "--run-dir", type=click.Path(path_type=Path), help="Where the run keeps its files.  [default: OUTPUT.onnxprune]"
    ),
    click.option(
        "--resume",
        is_flag=True,
        help="Go on with an interrupted run of the same command; with --run-dir nothing else is needed.",
    ),
    click.option("-v", "--verbose", is_flag=True, help="Show the scores of each round, and the threshold in them."),
    click.option("--overwrite", is_flag=True, help="Start anew in a run folder that holds a run already."),
]

TRAINING_OPTIONS = [
    click.option(
        "--trainer",
        type=click.Choice(["auto", "ort", "graph", "cuda"]),
        default="auto",
        help="ONNX Runtime training; or gradients as ONNX nodes, on any CPU or a GPU (auto: for long steps).",
    ),
    click.option(
        "--epochs", type=int, metavar="N", help="Epochs of fine-tuning in each round.  [default: about 1,000 steps]"
    ),
    click.option(
        "--minutes", type=float, metavar="M", help="Time for fine-tuning, all rounds together; results then vary."
    ),
    click.option(
        "--sparsify", type=int, default=0, metavar="N", help="Epochs before each cut in which what will go fades."
    ),
    click.option(
        "--lr",
        type=float,
        metavar="F",
        help="Peak learning rate of AdamW, for weights of 0.1; others in proportion.  [default: by how many matrices]",
    ),
    click.option(
        "--batch",
        type=int,
        metavar="N",
        help="Samples of a training step, in shards of 32.  [default: 64, of fewer than 4,000 samples down to 16]",
    ),
    click.option(
        "--loss",
        multiple=True,
        metavar="[OUTPUT=]KIND[:WEIGHT]",
        help=f"On labels: {', '.join(KINDS)}; repeatable. Or your own: an .onnx file or module:function.  "
        "[default: cross-entropy of classes, mse of numbers]",
    ),
    click.option("--ignore-index", type=int, metavar="N", help="The class label of what doesn't count, such as 255."),
    click.option(
        "--mix",
        type=float,
        default=0.0,
        metavar="A",
        help="Train on mixtures of two samples, in shares drawn from Beta(A, A).",
    ),
    click.option(
        "--distillation", type=float, default=0.8, metavar="F", help="Share of the loss against the uncut model."
    ),
    click.option(
        "--distil",
        multiple=True,
        metavar="[VALUE=]KIND[:WEIGHT]",
        help=f"What is compared with the uncut model: {', '.join(DISTANCE_KINDS)}, of an output or an inner value; "
        "repeatable.  [default: all outputs]",
    ),
    click.option(
        "--features", type=float, default=1.0, metavar="F", help="Weight of inner values against the uncut model's."
    ),
    click.option("--temperature", type=float, default=2.0, metavar="F", help="Of distillation between classes."),
    click.option("--smoothing", type=float, default=0.0, metavar="F", help="Share of a label spread over all classes."),
    click.option(
        "--ema",
        type=float,
        default=0.0,
        metavar="F",
        help="Keep an average of the weights that forgets so slowly: 0.999.",
    ),
    click.option(
        "--stop-after",
        type=int,
        metavar="N",
        help="End fine-tuning after N epochs without a lower loss on samples held out.",
    ),
    click.option(
        "--batch-statistics",
        is_flag=True,
        help="Batch normalisation trains on the statistics of each shard, in place of those that it has.",
    ),
    click.option(
        "--freeze",
        multiple=True,
        metavar="PATTERN",
        help="Parameters of such names keep their numbers in training; repeatable.",
    ),
]


@click.command("run")
@click.argument("model", type=click.Path(path_type=Path), required=False)
@options(RUN_OPTIONS + TRAINING_OPTIONS + IMAGE_OPTIONS)
@with_json
def run_command(model: Path | None, as_json: bool, **given: Any) -> int:
    """Prunes MODEL as far as the targets ask or the allowed drop permits, and fine-tunes what is left.

    With only --data: as small as one point of drop allows. Without data: to 75 % of the MACs, scored by weights.
    """
    if model is None:
        _check_alone()
    places = {name: given.pop(name) for name in ("output", "data", "eval_data", "run_dir", "resume", "overwrite")}
    places |= {name: places[name] or None for name in ("data", "eval_data")}
    images = image_options(given)
    given["providers"] = tuple(given.pop("ep"))
    with TerminalListener(given.pop("verbose")) as listener:
        report = run(model, images=images, options=RunOptions(**given), listener=listener, **places)
    if as_json:
        print_json(report.to_json())
    else:
        for table in report_tables(report):
            show(table)
    say(conclusion(report))
    return report.exit_status


def _check_alone() -> None:
    """Raises `UsageError` where more is said of a run to resume than its folder."""
    context = click.get_current_context()
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
    ]
    if not {"--resume", "--run-dir"} <= set(given):
        raise UsageError("give a MODEL; or --resume and --run-dir FOLDER, to go on with the run of that folder")
    if more := set(given) - {"--resume", "--run-dir", "--json", "-v"}:
        raise UsageError(f"{sorted(more)[0]}: a run is resumed by its folder alone, or by its whole command with MODEL")


def conclusion(report: Report) -> str:
    """What was written, and what it is good for, in a line or two."""
    quality = report.quality
    if not quality.written:
        return (
            f"nothing was written: the result is of no use as it is. It keeps {100 * (quality.useful or 0):.0f} % of "
            f"what the uncut model has above guessing, by {quality.metric}; {100 * (quality.floor or 0):.0f} % is the "
            "floor. What helps: a milder target, more samples, fine-tuning (--epochs), --keep for what is sensitive "
            f"('onnxprune sensitivity' tells), or --force. It lies in {report.pruned.path}"
        )
    said = f"written: {report.pruned.path}; plan, report and baseline: {report.run_dir}"
    if not report.met:
        said += f"\nthe targets were not met: {reached(report)}; the best accepted model was written"
    for why in report.unchecked:
        said += f"\nthe cut could not be compared with the masked model: {why}"
    return said + ("" if quality.measured else "\nits quality was not measured: give --data")


def reached(report: Report) -> str:
    """What was asked and not reached, in words."""
    parts = [
        f"{name} {100 * entry['reached']:.1f} % (asked {100 * entry['asked']:.1f} %)"
        for name, entry in report.target["resources"].items()
        if not entry["met"]
    ]
    if report.target["max_drop"] is not None and report.target["drop"] is not None:
        drop, allowed = report.target["drop"], report.target["max_drop"]
        if drop > allowed:
            parts.append(f"drop {drop:.{decimals(drop, allowed)}f} (allowed {allowed:g})")
    if report.pruned.macs == report.baseline.macs:
        parts.append("no cut was accepted")
    if report.target["slower"]:
        parts.append("it is slower than the uncut model here")
    return ", ".join(parts)
