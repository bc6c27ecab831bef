"""The book as its readers see it: complete, without an error, without the rest of the internet."""

import re
from urllib.parse import urljoin, urlsplit

import pytest
import web

BOOK = web.ROOT / "build" / "book"
CHAPTERS = sorted(path.stem for path in (web.ROOT / "notebooks").glob("*.ipynb"))
PAGES = sorted(str(path.relative_to(BOOK)) for path in BOOK.rglob("*.html"))
PAGES = [page for page in PAGES if not page.startswith("_")]  # no pages, but files they are made of

# Contrast of all text in the page with what lies behind it, by WCAG 2.2 (1.4.3): 4.5 : 1, or 3 : 1
# for large text. Formulas take the colour of the text around them; pictures are not text.
CONTRAST = r"""
const parse = (text) => (text.match(/[\d.]+/g) || []).map(Number);
const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const over = (top, below) => {
  const a = top.length > 3 ? top[3] : 1;
  return [0, 1, 2].map(k => a * top[k] + (1 - a) * below[k]);
};
const behind = (element) => {
  if (!element) return [255, 255, 255];
  const colour = parse(getComputedStyle(element).backgroundColor);
  if (colour.length === 3) return colour;
  const below = behind(element.parentElement);
  return colour.length && colour[3] > 0 ? over(colour, below) : below;
};
const found = new Set();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || element.closest('mjx-container')) continue;
  if (!element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
  const style = getComputedStyle(element);
  const below = behind(element);
  const colours = [over(parse(style.color), below), below].map(light).sort((a, b) => b - a);
  const ratio = (colours[0] + 0.05) / (colours[1] + 0.05);
  const size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  if (ratio < (large ? 3 : 4.5)) {
    const name = element.tagName.toLowerCase() + '.' + element.className;
    found.add(`${ratio.toFixed(2)} : 1 ${style.color} on ${below.map(Math.round)} ${name}`);
  }
}
return [...found];
"""


@pytest.fixture(scope="module")
def book(browser):
    if not (BOOK / "index.html").exists():
        pytest.skip("the book is not built: make book")
    with web.serve_folder(BOOK) as address:
        yield address


@pytest.fixture(params=["light", "dark"])
def scheme(request, browser):
    browser.colour_scheme(request.param)
    yield request.param
    browser.colour_scheme("light")


def open_page(browser, book, page):
    """Opens a page and waits until its formulas are drawn."""
    browser.open(f"{book}/{page}")
    browser.wait(lambda page: page.run("return document.readyState") == "complete")
    formulas = "return !window.MathJax || !MathJax.startup || MathJax.startup.promise.then(() => 1)"
    browser.wait(lambda page: page.run(formulas), what="formulas")


@pytest.mark.parametrize("page", PAGES)
def test_page_loads_without_an_error_and_from_here_alone(browser, book, page):
    open_page(browser, book, page)
    assert browser.errors() == []
    assert browser.outside() == []
    assert not browser.find_all("mjx-merror"), "a formula that MathJax does not understand"
    assert browser.run("return [...document.images].filter(i => !i.naturalWidth).length") == 0
    assert browser.run("return document.documentElement.lang") == "en"
    without = "return [...document.images].filter(i => !(i.alt || '').trim()).map(i => i.src)"
    assert browser.run(without) == []


def test_chapters_are_listed_in_reading_order(browser, book):
    open_page(browser, book, "index.html")
    links = browser.run(
        "return [...document.querySelectorAll('.bd-links a')].map(a => a.getAttribute('href'))"
    )
    chapters = [re.sub(r"^notebooks/|\.html$", "", link) for link in links if "notebooks/" in link]
    assert [name for name in chapters if re.match(r"\d\d_", name)] == [
        name for name in CHAPTERS if re.match(r"\d\d_", name)
    ]
    assert set(chapters) - {"parameters/README"} == set(CHAPTERS)


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_chapter_shows_its_figures_with_words_of_their_own(browser, book, name):
    open_page(browser, book, f"notebooks/{name}.html")
    texts = browser.run("return [...document.querySelectorAll('.cell_output img')].map(i => i.alt)")
    assert texts
    for text in texts:
        assert len(text.split()) >= 5 and not re.search(r"[0-9a-f]{12}", text), text


def test_search_finds_the_projection_loss(browser, book):
    open_page(browser, book, "search.html?q=projection+loss")
    browser.wait_for("#search-results .search li a", seconds=60)
    finished = "return document.querySelector('#search-results p')?.textContent || ''"
    browser.wait(lambda page: "found" in page.run(finished), 60, "the end of the search")
    found = {urlsplit(link.get_attribute("href")).path for link in browser.find_all(".search a")}
    assert "/notebooks/00_reconstruct_in_a_minute.html" in found
    assert "/reference.html" in found
    assert browser.errors() == [] and browser.outside() == []


def test_links_lead_to_pages_of_the_book(browser, book):
    there = {str(path.relative_to(BOOK)) for path in BOOK.rglob("*") if path.is_file()}
    broken = []
    for page in PAGES:
        address = f"{book}/{page}"
        text = (BOOK / page).read_text(encoding="utf-8")
        for target in set(re.findall(r'(?:href|src)="([^"#?]+)', text)):
            parts = urlsplit(urljoin(address, target))
            if f"{parts.scheme}://{parts.netloc}" == book:
                path = parts.path.lstrip("/") or "index.html"
                broken += [] if path in there else [f"{page}: {target}"]
    assert broken == []


@pytest.mark.parametrize("page", ["index.html", "reference.html", f"notebooks/{CHAPTERS[0]}.html"])
def test_text_can_be_told_from_its_background(browser, book, scheme, page):
    open_page(browser, book, page)
    assert browser.run("return document.documentElement.dataset.theme") == scheme
    assert browser.run(CONTRAST) == []
    # The same check finds a grey that is too faint on either page.
    browser.run("document.querySelector('.bd-article p:not(:has(img))').style.color = '#777777'")
    assert browser.run(CONTRAST) != []


def test_a_reader_can_choose_the_dark_page(browser, book):
    open_page(browser, book, "index.html")
    browser.wait_for(".article-header-buttons .theme-switch-button").click()
    browser.wait_for(".article-header-buttons .dropdown-menu.show [data-mode=dark]").click()
    assert browser.run("return document.documentElement.dataset.theme") == "dark"
    open_page(browser, book, "reference.html")
    assert browser.run("return document.documentElement.dataset.theme") == "dark"
    browser.run("localStorage.clear()")
