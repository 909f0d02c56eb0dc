"""The page in a real browser: every plot is drawn, nothing is complained of, nothing is fetched, nothing sticks out."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from replay.report import files
from replay.report.assemble import assemble
from tests.make_experiment import write_demo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")

# Beside the page, never in it: measures the report from a frame of the given width, once it has been laid out.
PROBE = """<!doctype html>
<iframe id=f style="width:%dpx;height:3000px;border:0" src="report.html"></iframe><pre id=out></pre>
<script>
f.onload = () => {
  const page = f.contentDocument, plots = [...page.querySelectorAll(".plot > svg")], seen = f.contentWindow.getComputedStyle;
  out.textContent = JSON.stringify({
    plots: plots.length,
    empty: plots.filter(s => s.getBoundingClientRect().height < 60 || !s.querySelector(".role-mark path")).length,
    unlabelled: plots.filter(s => s.getAttribute("role") != "img" || s.getAttribute("aria-label").length < 20).length,
    colours: [...new Set(plots.flatMap(s => [...s.querySelectorAll(".role-mark path")]).map(p => {
      const fill = seen(p).fill; return fill == "none" ? seen(p).stroke : fill}))],
    paper: seen(page.body).backgroundColor, ink: seen(page.body).color,
    sticksOut: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    fetched: f.contentWindow.performance.getEntriesByType("resource").map(r => r.name),
  });
};
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    demo = write_demo(folder / "demo", {"round_robin": 0.8, "least_outstanding": 1.4, "queue_depth": 2.0}, repeats=3, span_s=700)
    return files.write(assemble([demo]), folder / "report")["html"]


def chromium(profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    quiet = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}",
    )  # fmt: skip
    return subprocess.run([CHROMIUM, *quiet, *arguments], capture_output=True, text=True, timeout=90, check=True)


def look(page: Path, tmp_path: Path, width: int, *arguments: str) -> tuple[dict[str, object], list[str]]:
    """(what the probe measured at that width, console messages)."""
    probe = page.with_name(f"probe-{width}.html")
    probe.write_text(PROBE % width)
    options = ("--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom", *arguments)
    done = chromium(tmp_path / "profile", *options, probe.as_uri())
    found = re.search(r'<pre id="out">(.+?)</pre>', done.stdout)
    assert found, f"the page was not laid out: {done.stdout[-500:]} {done.stderr[-2000:]}"
    return json.loads(found[1].replace("&amp;", "&")), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (380, "light")])
def test_every_plot_is_drawn_in_its_colours_and_nothing_sticks_out(page: Path, tmp_path: Path, width: int, scheme: str) -> None:
    dark = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
    found, console = look(page, tmp_path, width, *dark)
    assert console == []
    assert (found["plots"], found["empty"], found["unlabelled"], found["sticksOut"]) == (5, 0, 0, 0)
    assert found["fetched"] == []
    assert found["paper"] == ("rgb(18, 23, 28)" if scheme == "dark" else "rgb(253, 253, 252)")
    first_policy = "rgb(86, 180, 233)" if scheme == "dark" else "rgb(0, 114, 178)"
    colours = found["colours"]
    assert isinstance(colours, list)
    assert first_policy in colours, "the variables of the page colour the plots"
    assert "rgb(0, 0, 0)" not in colours, "black is what an unknown colour falls back to"


def test_the_check_would_see_a_page_that_fetches(page: Path, tmp_path: Path) -> None:
    """The control of the test above: with an image from elsewhere it is listed, or the page's own policy refuses it aloud."""
    fetching = page.read_text().replace("<main>", '<main><img src="http://127.0.0.1:9/proof.png">')
    for name, text in (
        ("barred", fetching),
        ("open", fetching.replace("default-src 'none';", "default-src *;").replace("img-src data:", "img-src *")),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "report.html").write_text(text)
        found, console = look(folder / "report.html", folder, 1200)
        refused = [line for line in console if "Content Security Policy" in line]
        if name == "barred":
            assert refused
        else:
            assert found["fetched"] == ["http://127.0.0.1:9/proof.png"]
