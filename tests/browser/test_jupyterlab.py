"""The notebooks in JupyterLab: each opens as it was committed, and chapter 0 runs from the menu."""

from functools import partial

import pytest
import web

NOTEBOOKS = sorted(path.name for path in (web.ROOT / "notebooks").glob("*.ipynb"))

# The open notebook, and what it holds: cells that are out of sight are in its model alone.
PANEL = """
const panel = [...window.jupyterapp.shell.widgets('main')].find(w => w.content && w.content.model);
"""
STATE = (
    PANEL
    + """
if (!panel) return {};
const found = {name: panel.context.path, status: panel.sessionContext.kernelDisplayStatus,
               counts: [], errors: [], stderr: [], last: ''};
for (const cell of panel.content.model.cells) {
  if (cell.type !== 'code') continue;
  found.counts.push(cell.executionCount);
  for (let k = 0; k < cell.outputs.length; k++) {
    const output = cell.outputs.get(k).toJSON();
    if (output.output_type === 'error') found.errors.push(output.ename + ': ' + output.evalue);
    if (output.name === 'stderr') found.stderr.push(output.text);
    found.last = [output.text].flat().join('');
  }
}
return found;
"""
)

# Another value in the cell of parameters, as "Your turn" of chapter 0 proposes.
CHANGE = (
    PANEL
    + """
let changed = 0;
for (const cell of panel.content.model.cells) {
  if (!(cell.getMetadata('tags') || []).includes('parameters')) continue;
  const source = cell.sharedModel.getSource();
  cell.sharedModel.setSource(source.replace(arguments[0], arguments[1]));
  changed += cell.sharedModel.getSource() !== source;
}
return changed;
"""
)


@pytest.fixture
def open_notebook(browser, lab):
    """A function that opens a notebook and waits until its cells are drawn and its kernel is up."""

    def open_one(name):
        browser.open(lab(name))
        browser.wait_for(".jp-NotebookPanel .jp-Cell .jp-MarkdownOutput h1", seconds=120)
        browser.wait(lambda page: page.run(STATE).get("status") == "idle", 120, "an idle kernel")
        return browser.run(STATE)

    yield open_one
    browser.run(PANEL + "return panel && panel.sessionContext.shutdown().then(() => true)")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_opens_without_an_error(browser, open_notebook, name):
    state = open_notebook(name)
    assert state["name"] == name
    assert state["counts"] == list(range(1, len(state["counts"]) + 1))
    assert state["errors"] == [] and state["stderr"] == []
    assert not browser.find_all(".jp-Dialog")
    assert browser.find_all("mjx-container"), "formulas are not drawn"
    assert browser.outside() == []


# The photographs take a minute or two and 4 GB; on a busy machine much longer.
@pytest.mark.parametrize("dataset", ["digits", "photographs"])
def test_chapter_0_runs_from_the_menu(browser, open_notebook, dataset):
    cells = len(open_notebook(NOTEBOOKS[0])["counts"])
    browser.find(".jp-NotebookPanel .jp-Cell h1").click()
    choose(browser, "Edit", "Clear Outputs of All Cells")
    assert browser.run(STATE)["last"] == ""
    if dataset != "photographs":
        assert browser.run(CHANGE, '"photographs"', f'"{dataset}"') == 1

    choose(browser, "Run", "Run All Cells")
    state = browser.wait(partial(finished, counts=[*range(1, cells + 1)]), 3600, "the last cell")
    assert state["errors"] == []
    assert "10 of 10 pictures" in state["last"]
    assert browser.outside() == []


def choose(browser, menu, item):
    """Clicks an item of a menu."""
    for kind, text in (("MenuBar", menu), ("Menu", item)):
        path = f"//div[contains(@class, 'lm-{kind}-itemLabel') and text()='{text}']"
        browser.wait(lambda page, path=path: page.driver.find_elements("xpath", path), what=text)
        browser.driver.find_element("xpath", path).click()


def finished(page, counts):
    """What the notebook holds once all cells have run or one has failed; until then None."""
    state = page.run(STATE)
    done = state["status"] == "idle" and (state["errors"] or state["counts"] == counts)
    return state if done else None
