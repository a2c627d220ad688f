"""The page: self-contained, and inert whatever the names in it are."""

from html.parser import HTMLParser

from anybatch._report import Figure, Heading, Table, Text, page

EVIL = "</title><script>alert(1)</script>\"'<img src=x onerror=alert(1)>"


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes.extend(attributes)

    def handle_data(self, data):
        self.text.append(data)


def test_every_word_is_escaped(tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes(b"\x89PNG")
    blocks = [Heading(EVIL), Text(EVIL), Text(EVIL, note=True), Table([EVIL], [[EVIL]]), Figure(picture, EVIL)]
    tags = Tags()
    tags.feed(page(EVIL, blocks))
    assert "script" not in tags.tags
    assert tags.tags.count("img") == 1
    assert not any(name.startswith("on") for name, _ in tags.attributes)
    assert sum(EVIL in text for text in tags.text) == 8


def test_nothing_comes_from_outside():
    text = page("title", [Text("body")])
    assert "default-src 'none'" in text
    assert "http://" not in text
    assert "https://" not in text


def test_marked_rows():
    text = page("t", [Table(["a", "b"], [["1", "2"], ["3", "4"]], frozenset({1}))])
    assert text.count('class="marked"') == 1
    assert text.index("<td>1</td>") < text.index('class="marked"') < text.index("<td>3</td>")
