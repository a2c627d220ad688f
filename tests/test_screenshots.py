"""The page in a real browser, at desktop and phone width: readable in light and dark, and no scrolling sideways."""

import re
import shutil
import subprocess
from html import escape

import pytest

from anybatch._report.report import report

pytest.importorskip("PIL")
from PIL import Image
from test_run_report import written

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
    for i, scale in enumerate((1, 8, 32)):
        name = ["a", "x" * 120, "ein sehr langer Name <b>"][i]
        metrics = [
            (10 * k, 20.0 * k, {"accuracy": k / 10, "a metric with a very long name": 1 / k}) for k in range(1, 9)
        ]
        written(
            folder / f"{name}.jsonl", scale=scale, metrics=metrics, header={"note": "y" * 500, "i": "z" * 300 + str(i)}
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


@pytest.mark.parametrize("width", [1280, 390])
def test_no_scrolling_sideways(page, tmp_path, width):
    """Measured from outside, with the page in a frame of this width and all its folds open."""
    text = page.read_text().replace("<details>", "<details open>")
    measure = (
        "let d = this.contentDocument.documentElement; document.title = 'W ' + d.clientWidth + ' ' + d.scrollWidth"
    )
    frame = (
        f'<iframe style="width:{width}px;height:900px;border:0" onload="{measure}" srcdoc="{escape(text)}"></iframe>'
    )
    outer = tmp_path / "outer.html"
    outer.write_text(f"<!doctype html><title></title><body>{frame}")
    found = re.search(r"<title>W (\d+) (\d+)", chromium(tmp_path, "--dump-dom", outer.as_uri()))
    assert found is not None
    assert [int(number) for number in found.groups()] == [width, width]


def test_the_policy_stops_scripts(page, tmp_path):
    copy = tmp_path / "copy.html"
    copy.write_text(page.read_text().replace("</body>", "<script>document.title = 'ran'</script></body>"))
    found = chromium(tmp_path, "--dump-dom", copy.as_uri())
    assert "<title>3 training runs" in found
