"""The site of the documentation: strict, from the repository alone, every public name, nothing from elsewhere."""

import re
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_public import KINDS, RETURNED

import anybatch

ROOT = Path(__file__).parent.parent
API = "\n".join(page.read_text() for page in sorted(ROOT.glob("docs/api/*.md")))
CONFIG = (ROOT / "mkdocs.yml").read_text()


def test_every_public_name_has_its_place():
    listed = re.findall(r"^::: anybatch\.(?!integrations\.)(?:[\w.]+\.)?(\w+)$", API, re.MULTILINE)
    assert sorted(listed) == sorted([*(n for n in anybatch.__all__ if not n.startswith("__")), *KINDS, "sinks"])


def test_every_page_is_in_the_navigation():
    pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    assert set(re.findall(r": ([\w/-]+\.md)$", CONFIG, re.MULTILINE)) == pages


class Loaded(HTMLParser):
    """What a browser fetches for a page by itself."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.found.append(values.get("src") or "")
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(values.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", ROOT / "mkdocs.yml", "-d", target]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return target


def test_nothing_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        outside = [url for url in Loaded(text).found if re.match(r"(?:\w+:)?//", url)]
        assert not outside, page.name
        assert 'class="mermaid"' not in text, "mermaid's script would be fetched"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", style.read_text()), style.name


def test_what_was_loaded_is_there(site):
    for page in site.rglob("*.html"):
        for url in filter(None, Loaded(page.read_text()).found):
            if page.name != "404.html" and not url.startswith("data:"):
                assert (page.parent / url.split("?")[0].split("#")[0]).exists(), f"{page.name}: {url}"


def test_the_api_pages_show_signatures_and_examples(site):
    text = "\n".join(page.read_text() for page in sorted(site.glob("api/*.html")))
    for name in anybatch.__all__:
        if not name.startswith("__"):
            assert re.search(rf'id="anybatch\.(?:[\w.]+\.)?{name}"', text), name
    assert "&gt;&gt;&gt;" in text


def test_what_is_returned_is_linked_from_what_returns_it(site):
    """From the function's own section, or from the section of the kind that holds it."""
    sections = {}
    for page in site.glob("api/*.html"):
        _, *parts = re.split(r'<h[23] id="(anybatch\.[\w.]+)"', page.read_text())
        sections |= {name.split(".")[-1]: text for name, text in zip(parts[::2], parts[1::2], strict=True)}
    for function, kinds in RETURNED.items():
        seen = sections[function]
        for kind in kinds:
            assert re.search(rf'href="[\w.]*#anybatch\.[\w.]+\.{kind.__name__}"', seen), (
                f"{function} has no {kind.__name__}"
            )
            seen += sections[kind.__name__]
            for field in fields(kind):
                assert f">{field.name}<" in sections[kind.__name__]
