"""What a run tells while it works. The command line shows it; a program may pass its own listener."""

from __future__ import annotations


class Listener:
    """Receives the progress of a run; this one is silent."""

    def stage(self, text: str) -> None:
        """A new step begins."""

    def progress(self, text: str, done: int, total: int) -> None:
        """The current step is `done` of `total`."""

    def note(self, text: str) -> None:
        """Something worth keeping on the screen."""

    def detail(self, text: str) -> None:
        """Something for who wants to see more."""
