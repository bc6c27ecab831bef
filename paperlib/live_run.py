"""A reconstruction that runs beside whoever watches it: started, paused, continued, stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import Tensor

from paperlib.frames import Frames
from paperlib.record import Reconstruction

STATES = ("ready", "running", "paused", "stopped", "done", "failed")


class Stopped(Exception):  # noqa: N818 - not an error: somebody asked for it
    """Raised inside the run to end it between two steps."""


class LiveRun:
    """One attack in a thread of its own.

    PyTorch computes without Python's lock, so that the thread that watches stays free. A pause or a
    stop takes effect after the step that is being computed.

    Attributes:
        frames: the course of the run so far.
        state: one of `STATES`.
        record: the result, once the state is "done".
        error: what went wrong in words, once the state is "failed".
    """

    def __init__(self, work: Callable[[Callable[..., Any]], Reconstruction], *, frames: int = 64):
        """Describe the run; it begins with `start`.

        Args:
            work: called with a callback for `reconstruct`; returns its record.
            frames: most frames that are kept.
        """
        self.frames = Frames(most=frames)
        self.state = "ready"
        self.record: Reconstruction | None = None
        self.error: str | None = None
        self._work = work
        self._go = threading.Event()
        self._go.set()
        self._stop = False
        # Guards the tests and changes of the state; nobody waits or runs the work while holding it.
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="reconstruction", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the run has begun and not ended: running or paused."""
        return self.state in ("running", "paused")

    def start(self) -> None:
        """Begin.

        Raises:
            RuntimeError: if the run has begun before.
        """
        with self._lock:
            if self.state != "ready":
                raise RuntimeError(f"a run begins once: this one is {self.state}")
            self.state = "running"
        self._thread.start()

    def pause(self) -> None:
        """Hold after the present step; without effect on a run that does not run."""
        with self._lock:
            if self.state == "running":
                self._go.clear()
                self.state = "paused"

    def resume(self) -> None:
        """Go on from a pause; without effect otherwise."""
        with self._lock:
            if self.state == "paused":
                self.state = "running"
                self._go.set()

    def stop(self) -> None:
        """End after the present step, paused or not; what was found so far stays in `frames`."""
        with self._lock:
            if self.state == "ready":
                self.state = "stopped"
            elif self.alive:
                self._stop = True
                self._go.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the run has ended, at most `timeout` seconds."""
        if self.state != "ready" and self._thread.ident is not None:
            self._thread.join(timeout)

    def _step(self, stage: str, loss: float, X: Tensor) -> None:
        self.frames(stage, loss, X)
        self._go.wait()
        if self._stop:
            raise Stopped

    def _run(self) -> None:
        try:
            self.record = self._work(self._step)
            self.frames("result", self.record.loss, self.record.samples)
        except Stopped:
            self._end("stopped")
        except Exception as error:  # shown to the person who watches: a thread has no other way
            self._end("failed", f"{type(error).__name__}: {error}")
        else:
            self._end("done")

    def _end(self, state: str, error: str | None = None) -> None:
        with self._lock:
            self.error = error  # first: who sees "failed" reads it without the lock
            self.state = state
