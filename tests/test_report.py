"""The page: self-contained, and inert whatever the names in it are."""

from html import unescape
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib")

from anybatch._report.chart import Chart, Legend, Line
from anybatch._report.page import Fold, Grid, Heading, Table, Text, inert, page

EVIL = "</title></svg><script>alert(1)</script>\"'<img src=x onerror=alert(1)>"


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.extend(attributes)

    def handle_data(self, data):
        self.text.append(data)


def test_every_word_is_escaped():
    chart = Chart(EVIL, EVIL, [Line([(0, 1), (1, 2)], EVIL)])
    blocks = [Heading(EVIL), Text(EVIL), Text(EVIL, note=True), Table([EVIL], [[EVIL]]),
              Fold(EVIL, [Text(EVIL)]), Grid([chart]), Legend([(EVIL, EVIL, ())], EVIL)]  # fmt: skip
    tags = Tags(page(EVIL, blocks))
    assert not {"script", "img"} & set(tags.tags)
    assert not any(name.startswith("on") for name, _ in tags.attributes)
    assert (
        sum(text.count(EVIL) for text in tags.text) == 11 + 8
    )  # of the chart: above, below, at its line, in two strips


def test_nothing_comes_from_outside():
    text = page("title", [Text("body"), Chart("a", "b", [Line([(0, 1)], "c")])])
    assert "default-src 'none'" in text
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "href" not in text


def test_marked_rows_and_sides():
    text = page("t", [Table(["a", "b"], [["1", "2"], ["3", "4"]], frozenset({1}), left=1)])
    assert text.count('class="marked"') == 1
    assert text.index('<td class="l">1</td><td>2</td>') < text.index('class="marked"') < text.index(">3</td>")


@given(st.text(st.characters()))
def test_inert_text_is_plain_utf8_that_shows_what_it_was_given(text):
    found = inert(text)
    found.encode()
    assert not set(found) & set("<>\"'")
    shown = unescape(found)
    assert shown.isprintable() or any(c.isspace() for c in shown)
    if text.isascii() and text.isprintable():
        assert shown == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\x00b", "a\\x00b"), ("\udcff", "\\udcff"), ("\u202egnp", "\\u202egnp"), ("é→", "é→"), ("a\nb", "a\\nb")],
)
def test_what_cannot_be_seen_is_written_as_its_code(text, shown):
    assert inert(text) == shown
