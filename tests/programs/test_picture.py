"""The picture of README is that of the registered components."""

import pathlib
import xml.etree.ElementTree

from experiments import picture
from moe_jax.dispatch import DISPATCHERS
from moe_jax.exchanges import EXCHANGES

ROOT = pathlib.Path(__file__).parents[2]


def test_the_picture_is_up_to_date():
    assert (ROOT / "docs" / "parts.svg").read_text() == picture.picture()


def test_the_picture_is_an_svg_that_names_the_parts():
    words = [e.text for e in xml.etree.ElementTree.fromstring(picture.picture()).iter() if e.text]
    assert {c.__name__ for c in (*DISPATCHERS, *EXCHANGES)} <= set(words)


def test_long_lists_end_in_their_number():
    assert picture.names([int, str, bool, dict], 3) == ["int", "str", "and 2 more"]
    assert picture.names([int, str], 3) == ["int", "str"]
