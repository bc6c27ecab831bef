"""The explorer as a web page: pictures follow the slider, runs start and stop, bad values stay."""

import re

import pytest
from selenium.webdriver.common.keys import Keys

EXPLORER = "18_explorer.ipynb"
PICTURES = "img[alt*='training pictures, each above']"


@pytest.fixture(scope="module")
def page(browser, chapters, tmp_path_factory):
    """The explorer, open, its stored run on show."""
    import web

    with web.start_voila(chapters / EXPLORER, tmp_path_factory.mktemp("voila")) as address:
        browser.open(address)
        browser.wait_for(PICTURES, seconds=600)  # a busy machine starts kernels slowly
        yield browser


def control(page, label):
    """The widget with that description."""
    path = f"//div[contains(@class, 'widget-inline-hbox')][label[text()='{label}']]"
    return page.driver.find_element("xpath", path)


def enter_seed(page, value):
    box = control(page, "seed").find_element("css selector", "input")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(value, Keys.TAB)


def press(page, name):
    page.driver.find_element("xpath", f"//button[contains(., '{name}')]").click()


def text(page):
    return page.run("return document.body.innerText")


def picture(page):
    return page.find(PICTURES).get_attribute("src")


def move_slider(page, label, key):
    handle = control(page, label).find_element("css selector", ".noUi-handle")
    handle.send_keys(key)


def test_a_stored_run_is_there_at_once_and_the_slider_changes_the_pictures(page):
    assert "stored run" in text(page)
    last = picture(page)
    move_slider(page, "step shown", Keys.HOME)
    page.wait(lambda p: picture(p) != last, what="other pictures")
    move_slider(page, "step shown", Keys.END)
    page.wait(lambda p: picture(p) == last, what="the last pictures again")


def test_a_bad_value_is_told_in_words_and_the_page_survives(page):
    enter_seed(page, "-1")
    press(page, "Start")
    alert = page.wait_for("[role=alert]", seconds=60)
    assert "seed must be at least 0, got -1" in alert.text
    enter_seed(page, "2")
    press(page, "Start")
    page.wait(lambda p: not p.find_all("[role=alert]"), 60, "the alert to go")
    page.wait(lambda p: re.search(r"(running|done): \d+", text(p)), 60, "a run")


def test_a_run_is_paused_continued_and_stopped_while_the_page_answers(page):
    press(page, "Stop") if "running:" in text(page) else None
    press(page, "Start")
    page.wait(lambda p: re.search(r"running: .*\n?step \d+", text(p)), 60, "the first step")
    press(page, "Pause")
    page.wait(lambda p: "paused:" in text(p), 30, "the pause")
    press(page, "Continue")
    page.wait(lambda p: re.search("(running|done):", text(p)), 30, "the run to go on")
    if "running:" in text(page):
        press(page, "Stop")
    page.wait(lambda p: re.search("(stopped|done):", text(p)), 60, "the end")


# Voila's own page asks a server of Font Awesome for icons; the explorer uses none of them.
ICONS = "https://cdn.jsdelivr.net/npm/@fortawesome/"


def test_nothing_comes_from_outside_and_nothing_goes_wrong(page):
    assert [url for url in page.outside() if not url.startswith(ICONS)] == []
    assert [error for error in page.errors() if not error.startswith(ICONS)] == []
