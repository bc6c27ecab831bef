import contextlib
import re
import threading

import pytest
import torch

import paperlib as pl
from paperlib.experiments.explorer import DATA_SETS, MOST_WEIGHTS, Setting, store_run
from paperlib.live_run import LiveRun

SMALL = Setting("digits", n=3, p_over_dn=6.0)


class Steps:
    """Stands for an attack: takes a step whenever it is let."""

    def __init__(self, steps=5):
        self.steps, self.allowed, self.taken = steps, threading.Semaphore(0), 0
        self.reached = threading.Semaphore(0)

    def __call__(self, callback):
        for step in range(self.steps):
            assert self.allowed.acquire(timeout=20)
            self.taken += 1
            self.reached.release()
            callback("bulk", 1.0 / (step + 1), torch.ones(2, 64))
        return pl.reconstruct(*easy(), progress=False)

    def let(self, count):
        for _ in range(count):
            self.allowed.release()
            assert self.reached.acquire(timeout=20)


def easy():
    problem = SMALL.problem()
    return problem.model, problem.theta, SMALL.n


def test_a_live_run_is_paused_continued_and_comes_to_its_end():
    work = Steps(4)
    run = LiveRun(work)
    assert run.state == "ready" and not run.alive
    run.start()
    work.let(2)
    run.pause()
    assert run.state == "paused" and run.alive
    work.allowed.release()  # at most one more step may be on its way
    work.allowed.release()
    run.join(0.3)
    assert work.taken <= 3
    run.resume()
    work.allowed.release()
    run.join(60)
    assert run.state == "done" and run.record.explained and work.taken == 4
    assert run.frames.stages[-1] == "result"
    with pytest.raises(RuntimeError, match="begins once: this one is done"):
        run.start()


@pytest.mark.parametrize("paused", [False, True])
def test_a_live_run_is_stopped_and_keeps_what_it_found(paused):
    work = Steps(100)
    run = LiveRun(work)
    run.start()
    work.let(3)
    if paused:
        run.pause()
    run.stop()
    work.allowed.release()
    run.join(20)
    assert run.state == "stopped" and run.record is None
    assert 2 <= len(run.frames.losses) <= 4


def test_a_run_that_ends_while_it_is_being_paused_has_ended():
    ended, record = threading.Event(), pl.reconstruct(*easy(), progress=False)
    run = LiveRun(lambda callback: record if ended.wait(20) else None)

    class Meanwhile(threading.Event):
        def clear(self):
            super().clear()
            ended.set()
            run._thread.join(0.5)  # what the run does between the test and the change of the state

    run._go = Meanwhile()
    run.start()
    run.pause()
    run.join(60)
    assert run.state == "done" and not run.alive


def test_two_who_start_a_run_at_once_start_it_once():
    run, refused = LiveRun(Steps(0)), []
    free = threading.Barrier(2)

    class Watched(LiveRun):
        @property
        def state(self):
            seen = self.__dict__["state"]
            if threading.current_thread() in both:
                with contextlib.suppress(threading.BrokenBarrierError):
                    free.wait(0.3)  # both have seen the state before either goes on
            return seen

        @state.setter
        def state(self, value):
            self.__dict__["state"] = value

    def start():
        try:
            run.start()
        except RuntimeError as error:
            refused.append(str(error))

    both = [threading.Thread(target=start) for _ in range(2)]
    run.__class__ = Watched
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(20)
    assert refused == ["a run begins once: this one is running"]
    run.join(60)
    assert run.state == "done"


def test_an_error_in_a_live_run_is_kept_in_words():
    def fail(callback):
        raise ValueError("theta must be finite")

    run = LiveRun(fail)
    run.start()
    run.join(20)
    assert run.state == "failed" and run.error == "ValueError: theta must be finite"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (Setting(dataset="cats"), "dataset must be one of digits"),
        (Setting(activation="cube"), "activation must be one of"),
        (Setting(n=0), "n must be at least 1, got 0"),
        (Setting(seed=-1), "seed must be at least 0, got -1"),
        (Setting(p_over_dn=0.0), "p_over_dn"),
        (Setting(p_over_dn=1e-3), r"p = 1 parameters cannot fit 10 labels"),
        (Setting(noise=-0.1), "noise"),
        (Setting("photographs", n=20, p_over_dn=40.0), "more than the explorer has to spare"),
    ],
)
def test_settings_without_sense_are_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        setting.problem()


def test_noise_has_the_norm_that_was_asked_for_and_leaves_the_rest_alone():
    clean, noisy = SMALL.problem(), Setting("digits", 3, 6.0, noise=0.1).problem()
    ratio = float((noisy.theta - clean.theta).norm() / clean.theta.norm())
    assert ratio == pytest.approx(0.1, rel=0.1)
    assert torch.equal(noisy.data.X, clean.data.X)


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    pytest.importorskip("ipywidgets")
    from paperlib.notebook_explorer import Explorer

    path = tmp_path_factory.mktemp("stored") / "run.npz"
    store_run(SMALL, path)
    return Explorer([path])


def test_a_run_that_could_not_be_stored_is_not_made(tmp_path, monkeypatch):
    monkeypatch.setattr(Setting, "attack", lambda *_: pytest.fail("the attack was run"))
    with pytest.raises(ValueError, match=r"path must end in .npz, got 'run.json'"):
        store_run(SMALL, tmp_path / "run.json")


@pytest.mark.parametrize("dataset", DATA_SETS)
def test_no_end_of_the_sliders_is_refused_for_its_size(explorer, dataset):
    assert dataset in explorer.dataset.options
    for n in (explorer.n.min, explorer.n.max):
        data = Setting(dataset, n).data()
        for ratio in (explorer.p_over_dn.min, explorer.p_over_dn.max):
            p = Setting(dataset, n, ratio).parameters(data)
            assert p == round(ratio * data.d * n) and p * data.d <= MOST_WEIGHTS


def picture(explorer):
    return re.search(r"base64,([^\"]+)", explorer.pictures.value)[1]


def test_a_stored_run_is_shown_at_once_with_its_end(explorer):
    explorer.show_stored(0)
    assert "stored run" in explorer.status.value
    assert "3 of 3 pictures found" in explorer.status.value
    assert explorer.setting == SMALL and explorer.hold.disabled


def test_the_slider_changes_pictures_and_their_description(explorer):
    explorer.show_stored(0)
    last = picture(explorer)
    explorer.step.value = 0
    assert picture(explorer) != last
    assert 'alt="3 training pictures' in explorer.pictures.value
    assert "0 of them agree" in explorer.pictures.value
    explorer.step.value = explorer.step.max
    assert picture(explorer) == last


def test_bad_values_are_told_in_words_and_the_page_goes_on(explorer):
    explorer.show_stored(0)
    before = picture(explorer)
    explorer.seed.value = -1
    explorer.start.click()
    assert "seed must be at least 0, got -1" in explorer.message.value
    assert 'role="alert"' in explorer.message.value
    assert picture(explorer) == before
    explorer.seed.value = 1
    explorer.start.click()
    assert explorer.message.value == ""
    explorer.run.join(60)
    explorer.refresh()
    assert "<b>done</b>" in explorer.status.value


def test_buttons_follow_the_run(explorer):
    explorer.show_stored(0)
    work = Steps(100)
    explorer.start.click()
    explorer._end_run()
    explorer.run = LiveRun(work)
    explorer._show(explorer.run.frames, SMALL, SMALL.data(), 1152)
    explorer.run.start()
    explorer.refresh()
    assert not explorer.hold.disabled and explorer.hold.description == "Pause"
    explorer.hold.click()
    assert explorer.hold.description == "Continue" and explorer.run.state == "paused"
    explorer.hold.click()
    assert explorer.hold.description == "Pause" and explorer.run.state == "running"
    explorer.stop.click()
    work.allowed.release()
    explorer.run.join(20)
    explorer.refresh()
    assert explorer.hold.disabled and explorer.stop.disabled
    assert explorer.run.state == "stopped"


def test_an_explorer_without_a_stored_run_is_refused():
    pytest.importorskip("ipywidgets")
    from paperlib.notebook_explorer import Explorer

    with pytest.raises(ValueError, match="at least one stored run"):
        Explorer([])


def test_files_of_something_else_are_no_stored_runs(tmp_path):
    pytest.importorskip("ipywidgets")
    from paperlib.notebook_explorer import Explorer

    frames = pl.Frames()
    frames("bulk", 1.0, torch.ones(2, 64))
    frames.save(tmp_path / "other.npz", about={"pictures": 3})
    with pytest.raises(ValueError, match=r"other.npz holds no run .* of dataset, n, .*'pictures'"):
        Explorer([tmp_path / "other.npz"])
    (tmp_path / "empty.npz").touch()
    with pytest.raises(ValueError, match=r"empty\.npz is damaged"):
        Explorer([tmp_path / "empty.npz"])
    with pytest.raises(FileNotFoundError):
        Explorer([tmp_path / "nothing.npz"])
