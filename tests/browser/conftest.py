"""Fixtures of the browser tests; without Chromium every one of them is skipped, and says why."""

import shutil

import pytest

pytest.importorskip("selenium", reason="selenium is missing: pip install -e '.[browser]'")

import web  # noqa: E402 - needs selenium


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A fresh Chromium for the whole session."""
    if web.find_chromium() is None:
        pytest.skip("Chromium and chromedriver were not found (Debian: chromium, chromium-driver)")
    page = web.Browser(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture(scope="session")
def chapters(tmp_path_factory):
    """A copy of the folder of notebooks: what a test runs or saves changes nothing committed."""
    folder = tmp_path_factory.mktemp("checkout") / "notebooks"
    hidden = shutil.ignore_patterns(".*", "sweeps")
    shutil.copytree(web.ROOT / "notebooks", folder, ignore=hidden)
    return folder


@pytest.fixture(scope="session")
def lab(browser, chapters, tmp_path_factory):
    """JupyterLab on the notebooks: a function from a notebook's name to its address."""
    with web.start_lab(chapters, tmp_path_factory.mktemp("lab")) as address:
        yield address


@pytest.fixture
def voila(browser, chapters, tmp_path):
    """A function from a notebook's name to its address as a page by Voila."""
    with web.contextlib.ExitStack() as servers:
        yield lambda name: servers.enter_context(web.start_voila(chapters / name, tmp_path / name))
