"""The errors a user can meet: a closed tree, each with the exit status of the command line.

A message says what failed, on which file, node or array, and what to do about it.
"""


class OnnxPruneError(Exception):
    """Base of everything this package raises on purpose."""

    exit_status = 1


class UsageError(OnnxPruneError):
    """Options that contradict each other, or an output that can't be written."""

    exit_status = 2


class ModelError(OnnxPruneError):
    """The model can't be used: unreadable, unsafe, not runnable, or nothing in it can be pruned."""

    exit_status = 3


class DataError(OnnxPruneError):
    """The data can't be used with this model."""

    exit_status = 4


class TargetError(OnnxPruneError):
    """No plan meets the targets within the allowance."""

    exit_status = 5


class TrainingError(OnnxPruneError):
    """Training failed, or isn't available on this platform."""

    exit_status = 6


class UselessError(OnnxPruneError):
    """The result knows little more than a guess, and wasn't written."""

    exit_status = 7


class DifferentError(OnnxPruneError):
    """What was compared is different."""

    exit_status = 8


class NotComparableError(OnnxPruneError):
    """What was to be compared can't be."""

    exit_status = 9
