"""The cards of data and models, and that the README says the same of the data."""

import importlib
import re
import sys
from pathlib import Path

import pytest

import paperlib as pl
from paperlib import data as loaders
from paperlib.networks.network import Network

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cards():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        yield importlib.import_module("cards")
        sys.modules.pop("cards")


def test_every_loader_and_every_network_has_a_card(cards):
    public = {getattr(pl, name) for name in pl.__all__}
    names = {
        thing.__name__
        for thing in public
        if getattr(thing, "__module__", "").startswith(loaders.__name__ + ".")
        and not isinstance(thing, type)
    }
    assert set(cards.LOADERS) == names
    networks = {t.__name__ for t in public if isinstance(t, type) and issubclass(t, Network)}
    assert networks - {"Network"} <= set(cards.MODELS)  # which is what one's own derive from


def test_a_card_tells_what_is_returned_from_where_and_under_which_terms(cards):
    for name in cards.LOADERS:
        card = "\n".join(cards.data_card(name))
        assert re.search(r":returns: A DataSet with \w+", card), name
        assert re.search(r":source: \w+", card), name
        assert re.search(r":licence:\n   \| \w+", card), name
        assert "``dtype``" in card
    assert "standardised with one mean" in "\n".join(cards.cards())


def test_a_card_of_a_model_has_its_defaults(cards):
    card = "\n".join(cards.model_card("ResNet"))
    assert re.search(r"``blocks``\n     - ``4``\n     - residual blocks", card)
    assert "of the paper" in card


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("photographs", ["public domain", "CC0", "CC BY 2.0"]),
        ("digits", ["CC BY 4.0"]),
        ("faces", ["for research"]),
        ("cifar10", ["distributed for research"]),
        ("sphere", ["none needed"]),
    ],
)
def test_the_readme_gives_the_licences_that_the_data_carry(cards, name, terms):
    (row,) = re.findall(rf"^\| `{name}` \|.*$", README, re.MULTILINE)
    _, licence = cards.origin(name)
    for term in terms:
        assert term in row and term in licence


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket", "china", "flower"])
def test_every_photograph_is_credited(cards, name):
    assert re.search(
        rf"\| {name}: scikit-\w+ \(.+\), (public domain|CC0|CC BY 2.0)",
        "\n".join(cards.data_card("photographs")),
    )
