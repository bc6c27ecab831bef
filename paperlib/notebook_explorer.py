"""The explorer: choose a training set and a model, and watch the data come back.

Widgets for JupyterLab and Voila. What they show is computed elsewhere: `experiments/explorer.py`
poses the problem, `live_run.py` runs the attack in a thread, `frames.py` keeps its course.
"""

from __future__ import annotations

import asyncio
import base64
import html
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from paperlib.activations import activation_names
from paperlib.animation import picture_rows, png_bytes
from paperlib.compare import Comparison, compare
from paperlib.data import DataSet
from paperlib.experiments.explorer import DATA_SETS, Setting
from paperlib.figures import PALETTE
from paperlib.frames import Frame, Frames
from paperlib.live_run import LiveRun

# How often a running attack is looked at. Drawing takes about a tenth of that.
REFRESH_SECONDS = 0.4

# Beyond what the sliders offer no answer comes within a minute or two.
MOST_PICTURES = 20
NOISE_LEVELS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)

# Height of a picture in pixels.
HEIGHT = 64


class Explorer:
    """Controls, pictures and loss curve of one attack; display `explorer.view`.

    Attributes:
        view: the widget to display.
        run: the live run, or None while a stored run is shown.
        frames: what is shown.
    """

    def __init__(self, stored: Sequence[str | os.PathLike[str]]):
        """Build the page, showing the first of the stored runs.

        Args:
            stored: files of `Frames.save` whose `about` holds the fields of a `Setting`; at least
                one.

        Raises:
            FileNotFoundError: if one of the files is not there.
            ValueError: if there is none, or a file is damaged or holds something else.
        """
        if not stored:
            raise ValueError("stored must name at least one stored run, got none")
        self._stored = [_stored_run(path) for path in stored]
        self.run: LiveRun | None = None
        self._task: asyncio.Task | None = None
        self._build()
        self.show_stored(0)

    # -- the page ---------------------------------------------------------------------------------

    def _build(self) -> None:
        wide = {"description_width": "9em"}
        layout = widgets.Layout(width="25em")
        default = self._stored[0][1]

        def place(widget: widgets.Widget) -> widgets.Widget:
            widget.style, widget.layout = wide, layout
            return widget

        self.dataset = place(
            widgets.Dropdown(options=list(DATA_SETS), value=default.dataset, description="pictures")
        )
        self.n = place(widgets.IntSlider(default.n, 1, MOST_PICTURES, description="how many, n"))
        self.p_over_dn = place(
            widgets.FloatSlider(
                default.p_over_dn, min=0.25, max=10, step=0.25, description="p / (d n)"
            )
        )
        self.activation = place(
            widgets.Dropdown(
                options=list(activation_names()),
                value=default.activation,
                description="activation",
            )
        )
        self.noise = place(
            widgets.SelectionSlider(
                options=[(f"{100 * level:g}%", level) for level in NOISE_LEVELS],
                description="noise on theta",
            )
        )
        self.seed = place(widgets.IntText(default.seed, description="seed"))
        self.stored = place(
            widgets.Dropdown(
                options=[
                    (f"{s.n} {s.dataset}, p = {s.p_over_dn:g} d n", i)
                    for i, (_, s) in enumerate(self._stored)
                ],
                description="stored run",
            )
        )
        self.start = widgets.Button(description="Start", button_style="primary")
        self.hold = widgets.Button(description="Pause", disabled=True)
        self.stop = widgets.Button(description="Stop", disabled=True)
        self.step = widgets.IntSlider(
            0,
            0,
            0,
            description="step shown",
            readout=False,
            style={"description_width": "7em"},
            layout=widgets.Layout(width="32em"),
        )
        self.play = widgets.Play(interval=150, show_repeat=False)
        self.status = widgets.HTML()
        self.message = widgets.HTML()
        self.pictures = widgets.HTML()
        self.curve = widgets.HTML()

        self.start.on_click(self._guard(self.start_run))
        self.hold.on_click(self._guard(self.hold_or_continue))
        self.stop.on_click(self._guard(self.stop_run))
        self.stored.observe(self._guard(lambda change: self.show_stored(change["new"])), "value")
        self.step.observe(self._guard(lambda change: self._draw()), "value")
        self.play.observe(self._guard(lambda change: self._play(change["new"])), "value")

        controls = widgets.VBox(
            [self.dataset, self.n, self.p_over_dn, self.activation, self.noise, self.seed]
            + [widgets.HBox([self.start, self.hold, self.stop]), self.stored]
        )
        shown = widgets.VBox([self.status, self.pictures, widgets.HBox([self.play, self.step])])
        self.view = widgets.VBox(
            [
                self.message,
                widgets.HBox(
                    [controls, widgets.VBox([shown, self.curve])],
                    layout=widgets.Layout(flex_flow="row wrap", grid_gap="1.5em"),
                ),
            ]
        )

    def _guard(self, action: Callable) -> Callable:
        """An event handler whose errors appear on the page, in words."""

        def handler(event: object) -> None:
            try:
                action(event)
            except Exception as error:
                self._say(str(error), alert=True)

        return handler

    def _say(self, text: str, *, alert: bool = False) -> None:
        colour = PALETTE[4] if alert else "inherit"
        role = "alert" if alert else "status"
        self.message.value = (
            f'<p role="{role}" style="color:{colour};font-weight:600;line-height:1.4">'
            f"{html.escape(text)}</p>"
            if text
            else ""
        )

    # -- what the buttons do ----------------------------------------------------------------------

    @property
    def setting(self) -> Setting:
        """What the controls say."""
        return Setting(
            dataset=self.dataset.value,
            n=self.n.value,
            p_over_dn=self.p_over_dn.value,
            activation=self.activation.value,
            noise=self.noise.value,
            seed=self.seed.value,
        )

    def start_run(self, event: object = None) -> None:
        """Pose the problem that the controls describe and attack it; a running attack is ended."""
        setting = self.setting
        self._say("training the model ...")
        problem = setting.problem()
        self._end_run()
        self._say("")
        self.run = LiveRun(lambda callback: setting.attack(problem, callback))
        self._show(self.run.frames, setting, problem.data, problem.model.p)
        self.run.start()
        self.refresh()
        self._watch()

    def hold_or_continue(self, event: object = None) -> None:
        """Pause a running attack, or go on with a paused one."""
        if self.run is not None:
            if self.run.state == "paused":
                self.run.resume()
            else:
                self.run.pause()
        self.refresh()

    def stop_run(self, event: object = None) -> None:
        """End the attack; what it found so far stays."""
        self._end_run()
        self.refresh()

    def _end_run(self) -> None:
        if self.run is not None:
            self.run.stop()
            self.run.join(REFRESH_SECONDS)

    def show_stored(self, index: int) -> None:
        """Show a run that was computed before."""
        frames, setting = self._stored[index]
        self._end_run()
        self.run = None
        self._say("")
        for name, value in setting.describe().items():
            getattr(self, name).value = value
        data = setting.data()
        self._show(frames, setting, data, setting.parameters(data))
        self.refresh()

    # -- what is shown ----------------------------------------------------------------------------

    def _show(self, frames: Frames, setting: Setting, data: DataSet, p: int) -> None:
        self.frames, self._setting, self._data, self._p = frames, setting, data, p
        self.step.max = self.step.value = 0
        self.pictures.value = self.curve.value = ""

    def _watch(self) -> None:
        """Look at the run until it has ended; the page is free to answer in between."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # no page is open: whoever drives the explorer calls refresh()
        self._task = loop.create_task(self._refresh_while_alive(self.run))

    async def _refresh_while_alive(self, run: LiveRun) -> None:
        refresh = self._guard(lambda event: self.refresh())
        shown = None
        while run is self.run and (run.alive or run.state != shown):
            if run.state == "running" or run.state != shown:
                shown = run.state  # before drawing: what ends meanwhile is drawn once more
                refresh(None)
            await asyncio.sleep(REFRESH_SECONDS)

    def refresh(self) -> None:
        """Bring the page up to date with the run."""
        state = "stored" if self.run is None else self.run.state
        alive = state in ("running", "paused")
        self.hold.disabled = self.stop.disabled = not alive
        self.hold.description = "Continue" if state == "paused" else "Pause"
        if state == "failed":
            self._say(self.run.error, alert=True)
        last = max(0, len(self.frames) - 1)
        follow = self.step.value == self.step.max
        self.step.max = self.play.max = last
        if follow and self.step.value != last:
            self.step.value = last  # draws
        else:
            self._draw()

    def _play(self, value: int) -> None:
        self.step.value = min(value, self.step.max)

    def _draw(self) -> None:
        frames = self.frames.all()
        if not frames:
            self.status.value = self._status(None, None)
            return
        frame = frames[min(self.step.value, len(frames) - 1)]
        data = self._data
        errors = compare(data.X, frame.samples)
        found = data.images(errors.matched_up_to_sign, index=range(data.n))
        strip = picture_rows([data.images(), found], height=HEIGHT)
        alternative = (
            f"{data.n} training pictures, each above the candidate nearest to it after step "
            f"{frame.step}: {errors.recovered(error='up_to_sign')} of them agree."
        )
        self.status.value = self._status(frame, errors)
        self.pictures.value = _image(png_bytes(strip), alternative)
        self.curve.value = _image(self._loss_curve(frame), f"Loss after step {frame.step}.")

    def _status(self, frame: Frame | None, errors: Comparison | None) -> str:
        setting = self._setting
        state = "stored run" if self.run is None else self.run.state
        first = (
            f"<b>{state}</b>: {setting.n} {setting.dataset}, d = {self._data.d:,}, "
            f"p = {self._p:,} parameters"
        )
        if frame is None:
            return f"<p>{first}</p>"
        second = (
            f"step {frame.step} of {len(self.frames.losses)}, {html.escape(frame.stage)}: "
            f"loss {frame.loss:.1e}, {errors.recovered(error='up_to_sign')} of {setting.n} "
            "pictures found up to sign"
        )
        third = ""
        if self.run is not None and self.run.record is not None:
            third = f"<br>{html.escape(self.run.record.status)}"
        return f'<p style="line-height:1.5">{first}<br>{second}{third}</p>'

    def _loss_curve(self, frame: Frame) -> bytes:
        """The loss against the step, the shown step marked, as PNG."""
        losses = np.array(self.frames.losses)
        figure = Figure(figsize=(6.6, 2.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        steps = np.arange(1, len(losses) + 1)
        axes.semilogy(steps, np.maximum(losses, 1e-30), color=PALETTE[0], linewidth=2)
        axes.plot(frame.step, max(frame.loss, 1e-30), "o", color=PALETTE[1], markersize=8)
        axes.set(xlabel="step", ylabel="projection loss")
        axes.grid(color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=90)
        return file.getvalue()


def _stored_run(path: str | os.PathLike[str]) -> tuple[Frames, Setting]:
    """The course of a stored run, and what was chosen for it."""
    frames, about = Frames.load(path)
    try:
        return frames, Setting(**about)
    except TypeError as error:
        names = ", ".join(field.name for field in fields(Setting))
        raise ValueError(
            f"{Path(path).name} holds no run of the explorer: expected values of {names}, "
            f"got {', '.join(map(repr, about)) or 'none'}"
        ) from error


def _image(png: bytes, alternative: str) -> str:
    code = base64.b64encode(png).decode()
    return (
        f'<img src="data:image/png;base64,{code}" alt="{html.escape(alternative)}" '
        'style="max-width:100%">'
    )
