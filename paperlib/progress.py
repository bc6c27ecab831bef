"""Progress of a reconstruction: a bar for long work, and a hook for whoever watches."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

# Work shorter than this shows no bar at all.
DELAY_SECONDS = 2.0


def progress_bar(show: bool | None, **options: Any) -> tqdm:
    """A bar of tqdm, for a terminal or a notebook.

    Args:
        show: whether to draw it; if None, unless PAPERLIB_PROGRESS=0 or tqdm's own TQDM_DISABLE=1
            is set.
        **options: of tqdm.
    """
    if show is None and os.environ.get("PAPERLIB_PROGRESS", "1") == "0":
        show = False
    return tqdm(**options) if show is None else tqdm(**options, disable=not show)


class Progress:
    """A tqdm bar of steps that appears after two seconds, showing stage and loss."""

    def __init__(
        self,
        show: bool | None = None,
        callback: Callable[[str, float, Tensor], None] | None = None,
    ):
        """Set the bar up; it shows itself after its delay.

        Args:
            show: see `progress_bar`.
            callback: called after every step with (stage, loss, candidates).
        """
        self._bar = progress_bar(
            show, desc="reconstruct", unit=" steps", delay=DELAY_SECONDS, leave=False
        )
        self._stage = ""
        self._callback = callback

    def stage(self, name: str) -> None:
        """A new stage begins."""
        self._stage = name
        self._bar.set_postfix_str(name, refresh=False)

    def step(self, loss: float, X: Tensor) -> None:
        """A step was taken."""
        self._bar.set_postfix_str(f"{self._stage}, loss {loss:.1e}", refresh=False)
        self._bar.update()
        if self._callback is not None:
            self._callback(self._stage, loss, X)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def __enter__(self) -> Progress:
        """Use as a context."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close on the way out, also after an error."""
        self.close()
