"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from onnxprune.choosing.select import Keep
from onnxprune.errors import UsageError
from onnxprune.evaluating.sources import ImageOptions

F = TypeVar("F", bound=Callable[..., Any])


class RoundTo(click.ParamType[int | None]):
    """A positive integer, or "auto" (None)."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The number, or None for auto."""
        if value == "auto" or value is None:
            return None
        if str(value).isdigit() and int(value) > 0:
            return int(value)
        self.fail(f"{value!r} is neither a positive number nor 'auto'", param, ctx)


ROUND_TO = RoundTo()


class Layers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """How many layers to drop, or "auto"."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """A number, or "auto"."""
        if value == "auto" or isinstance(value, int):
            return value  # type: ignore[no-any-return]
        if str(value).isdigit():
            return int(value)
        self.fail(f"{value!r} is neither a number nor 'auto'", param, ctx)


class PairType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """KEY=VALUE."""

    name = "pair"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        """The key and the value."""
        key, equals, text = str(value).rpartition("=")
        if not key or not equals:
            self.fail(f"{value!r} isn't KEY=VALUE", param, ctx)
        return key, self.value_of(text, param, ctx)

    def value_of(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What stands behind the sign."""
        return text


class WeightType(PairType):
    """OUTPUT=F"""

    name = "weight"

    def value_of(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The weight."""
        try:
            return float(text)
        except ValueError:
            self.fail(f"{text!r} is no number", param, ctx)


class ShapeType(PairType):
    """INPUT=N,N…"""

    name = "shape"

    def value_of(self, text: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The sizes."""
        if not all(part.isdigit() and int(part) for part in text.split(",")):
            self.fail(f"{text!r} isn't a shape such as 1,3,224,224", param, ctx)
        return tuple(int(part) for part in text.split(","))


class KeepType(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """PATTERN=LEAST or PATTERN=LEAST:MOST."""

    name = "keep"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Keep:
        """The bounds for the groups of such names."""
        pattern, _, shares = str(value).rpartition("=")
        least, _, most = shares.partition(":")
        try:
            bounds = float(least), float(most or 1)
        except ValueError:
            bounds = None
        if not pattern or bounds is None:
            self.fail(f"{value!r} isn't PATTERN=LEAST or PATTERN=LEAST:MOST, such as 'conv1*=0.5'", param, ctx)
        return Keep(pattern, *bounds)


KINDS_OPTION = click.option(
    "--kinds",
    multiple=True,
    metavar="K[,K…]",
    callback=lambda ctx, param, values: tuple(kind for value in values for kind in value.split(",") if kind),
    help="Cut only these kinds of groups: width, residual, group, head, qk, value, hidden.",
)
PROTECT_OPTION = click.option(
    "--protect",
    multiple=True,
    metavar="PATTERN",
    help="Parameters and nodes of such names keep their shape: '*', '?' and '[abc]' match; repeatable.",
)
KEEP_OPTION = click.option(
    "--keep",
    multiple=True,
    type=KeepType(),
    metavar="PATTERN=LEAST[:MOST]",
    help="Groups of such names keep at least, and at most, these shares of their units; repeatable, the last counts.",
)
LAYERS_OPTION = click.option(
    "--layers",
    type=Layers(),
    metavar="N|auto",
    help="Whole layers that go: prune drops this many, of the smallest weights; run at most so many, by what each was "
    "measured to lose (auto: as many as serve).  [default: auto for run with data or --target-latency, else 0]",
)
IMAGE_OPTIONS = [
    click.option("--mean", default="0", metavar="F[,F,F]", help="For folders of images: (pixels / 255 - mean) / std."),
    click.option("--std", default="1", metavar="F[,F,F]", help="As --mean."),
    click.option("--size", type=int, nargs=2, metavar="H W", help="For folders of images: height and width."),
    click.option("--layout", type=click.Choice(["nchw", "nhwc"]), default="nchw", help="For folders of images."),
    click.option("--channels", type=click.Choice(["rgb", "bgr"]), default="rgb", help="For folders of images."),
    click.option(
        "--crop",
        type=float,
        metavar="F",
        help="For folders of images: scale, and cut out the middle, this share of the shorter side, such as 0.875.  "
        "[default: squeeze to the size]",
    ),
    click.option(
        "--label-order",
        type=click.Choice(["names", "numbers"]),
        default="names",
        help="The class of a sub-folder: its place among the sorted names, or the number that is its name.",
    ),
    click.option("--label-offset", type=int, default=0, metavar="N", help="Added to the class of a sub-folder."),
]


def options(listed: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    """Adds a list of options to a command, in order."""

    def decorate(function: F) -> F:
        for option in reversed(listed):
            function = option(function)
        return function

    return decorate


def with_json(function: F) -> F:
    """Adds --json."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, all else on stderr.")(
        function
    )


def image_options(given: dict[str, Any]) -> ImageOptions:
    """Takes the image options out of a command's parameters. Raises `UsageError` for what isn't numbers."""
    try:
        mean, std = (tuple(float(x) for x in given.pop(name).split(",")) for name in ("mean", "std"))
    except ValueError as error:
        raise UsageError(f"--mean and --std take numbers separated by commas: {error}") from error
    rest = ("size", "layout", "channels", "crop", "label_order", "label_offset")
    return ImageOptions(mean, std, *(given.pop(name) for name in rest))
