"""The page in a real browser, at desktop and phone width: readable in light and dark, and no scrolling sideways."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image
from test_run_report import written

from anybatch._report.report import report
from anybatch._scaling import Moments

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--hide-scrollbars"]  # fmt: skip
DARK = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with all its parts, long names among them."""
    folder = tmp_path_factory.mktemp("page")
    names = ["embedding", *(f"transformer.blocks.{k}.attention.projection" for k in range(40)), "head", "<b>" * 40]
    layers = {name: Moments(1.0 + k**2, 1.0) for k, name in enumerate(names)}
    for i, scale in enumerate((1, 8, 32)):
        name = ["a", "x" * 120, "ein sehr langer Name <b>"][i]
        metrics = [
            (10 * k, 20.0 * k, {"accuracy": k / 10, "a metric with a very long name": 1 / k, "tiny": 1e-5 + 1e-9 * k})
            for k in range(1, 9)
        ]
        written(
            folder / f"{name}.jsonl",
            scale=scale,
            metrics=metrics,
            header={"note": "y" * 500, "i": "z" * 300 + str(i)},
            per_layer=layers,
        )
    target = folder / "page.html"
    target.write_text(report(sorted(folder.glob("*.jsonl"))))
    return target


def chromium(folder, *arguments):
    """What the browser prints."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, check=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("width", [1280, 390])
def test_light_and_dark(page, tmp_path, width):
    paper = []
    for flags in ([], DARK):
        picture = tmp_path / "page.png"
        size = [f"--window-size={width},1600", f"--screenshot={picture}"]
        chromium(tmp_path, *flags, *size, page.as_uri())
        with Image.open(picture) as image:
            assert image.size == (width, 1600)
            grey = image.convert("L")
        counts = grey.histogram()
        background = max(range(256), key=counts.__getitem__)
        written_on = sum(count for value, count in enumerate(counts) if abs(value - background) > 60)
        assert 0.005 < written_on / sum(counts) < 0.5
        for top in range(0, 1600, 400):  # no quarter of the picture is empty
            low, high = grey.crop((0, top, width, top + 400)).getextrema()
            assert high - low > 60, top
        paper.append(background)
    light, dark = paper
    assert light > 240
    assert dark < 40


def measured(page, tmp_path, width, code):
    """What `code` finds in the page's document `d`, from outside, in a frame of this width with all folds open."""
    text = page.read_text().replace("<details>", "<details open>")
    measure = f"let d = this.contentDocument; document.title = 'W ' + JSON.stringify((() => {{{code}}})())"
    frame = (
        f'<iframe style="width:{width}px;height:4000px;border:0" onload="{escape(measure)}" '
        f'srcdoc="{escape(text)}"></iframe>'
    )
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!doctype html><title></title><body>{frame}")
    found = re.search(r"<title>W (.*?)</title>", chromium(tmp_path, "--dump-dom", outer.as_uri()), re.DOTALL)
    assert found is not None
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("width", [1280, 390])
def test_no_scrolling_sideways(page, tmp_path, width):
    code = "return [d.documentElement.clientWidth, d.documentElement.scrollWidth]"
    assert measured(page, tmp_path, width, code) == [width, width]


@pytest.mark.parametrize("width", [1280, 390])
def test_no_label_of_a_chart_is_cut_or_covers_another(page, tmp_path, width):
    found = measured(
        page,
        tmp_path,
        width,
        """
        let bad = [], count = 0;
        for (const chart of d.querySelectorAll(".chart")) {
          const texts = [...chart.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
          count += texts.length;
          texts.forEach(([a, p], i) => {
            if (p.left < 0 || p.right > d.documentElement.clientWidth || p.height < 9) bad.push([a, p.left, p.right]);
            for (const [b, q] of texts.slice(i + 1))
              if (p.left < q.right && q.left < p.right && p.top < q.bottom && q.top < p.bottom) bad.push([a, b]);
          });
        }
        return [bad, count]
        """,
    )
    assert found[0] == []
    assert found[1] > 80


def test_under_the_pointer_is_a_value(page, tmp_path):
    found = measured(
        page,
        tmp_path,
        1280,
        """
        const box = d.querySelector(".chart").getBoundingClientRect(), found = [];
        for (let x = 0.2; x < 0.95; x += 0.05) {
          const at = d.elementFromPoint(box.left + x * box.width, box.top + 0.4 * box.height);
          const title = at.closest("g") && at.closest("g").querySelector("title");
          if (title) found.push(title.textContent);
        }
        return found
        """,
    )
    assert len(found) == 15
    assert len(set(found)) >= 5
    assert all(re.search(r"tau \(base iterations\) \d", text) for text in found)


def test_the_policy_stops_scripts(page, tmp_path):
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text().replace("</body>", "<script>document.title = 'ran'</script></body>"))
    found = chromium(tmp_path, "--dump-dom", copy.as_uri())
    assert "<title>3 training runs" in found
