"""The page in a real browser: nothing complains, nothing is asked for, and pointer and keyboard give readings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.browser import NAMES, Tab, browser, installed
from tests.helpers.commands import run_command
from tests.helpers.report_files import EVIL, write_run, write_sweep

PROGRAM = installed()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason=f"no browser here: none of {', '.join(NAMES)}"),
]

TIP = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"
WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    assert PROGRAM is not None
    with browser(PROGRAM) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of a run, of eight in comparison, and of a sweep, full of text that would run code."""
    folder = tmp_path_factory.mktemp("pages") / "a-long-name-in-which-no-line-can-be-broken-as-it-has-no-space-at-all"
    runs = [write_run(folder, f"run-{n}", steps=400, slope=1 / (n + 1), text=EVIL, seed=n) for n in range(8)]
    made = {}
    for name, arguments in {"run": runs[:1], "runs": runs, "sweep": [write_sweep(folder)]}.items():
        made[name] = folder.parent / f"{name}.html"
        done = run_command("report", *arguments, "--html", made[name])
        assert done.returncode == 0, done.stderr
    return made


@pytest.mark.parametrize("name", ["run", "runs", "sweep"])
@pytest.mark.parametrize("width", [1280, 400])
def test_a_page_complains_of_nothing_and_asks_for_nothing(
    name: str, width: int, tab: Tab, pages: dict[str, Path]
) -> None:
    tab.open(pages[name], width=width)
    assert tab.run("document.documentElement.dataset.ready") == "yes", "the script has run to its end"
    assert tab.run("document.title").endswith("raymem report"), "no text has run as code"
    assert tab.complaints == []
    assert tab.requests == [pages[name].as_uri()]
    assert not tab.run(WIDE), "nothing is cut at the side"


def test_a_violation_and_a_request_would_be_seen(tab: Tab, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><meta http-equiv='Content-Security-Policy' content=\"default-src 'none'\">"
        "<script>document.title = 'ran'</script><img src='x.png'>"
    )
    tab.open(page)
    assert tab.run("document.title") != "ran"
    assert any("Content Security Policy" in text for text in tab.complaints)


@pytest.mark.parametrize(("name", "charts", "lines"), [("run", 4, 8), ("runs", 5, 40)])
def test_curves_are_drawn(name: str, charts: int, lines: int, tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages[name])
    lengths = tab.run("[...document.querySelectorAll('.chart .line')].map(line => line.getTotalLength())")
    assert tab.run("document.querySelectorAll('.chart').length") == charts
    assert len(lengths) == lines and min(lengths) > 100
    looks = tab.run(
        "[...document.querySelectorAll('.chart:first-of-type')].slice(0, 1).flatMap(chart => "
        "[...chart.querySelectorAll('.series:not(.faint) .line')].map(l => getComputedStyle(l).strokeDasharray))"
    )
    assert len(set(looks)) == len(looks), "each curve has dashes of its own"


def test_the_pointer_reads_a_curve(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["run"])
    tab.hover("svg.chart", right=0.999)
    assert tab.run(TIP).startswith("step 400\n"), tab.run(TIP)
    assert "evaluation: " in tab.run(TIP)
    tab.hover("h1")
    assert tab.run(TIP) == ""


def test_the_keyboard_reads_a_curve(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["runs"])
    tab.run("document.querySelector('svg.chart').focus()")
    tab.press("End")
    words = tab.run(TIP)
    assert words.startswith("step 400\n") and [f"run-{n}: " in words for n in range(8)] == [True] * 8, words
    tab.press("Escape")
    assert tab.run(TIP) == ""


def test_the_front_is_drawn_and_its_points_are_told(tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["sweep"])
    assert tab.run("document.querySelector('.front .stairs').getTotalLength()") > 100
    words = "Trial 1, on the Pareto front: evaluation loss 2.5, peak 80.00 MiB. adapter.rank=2"
    tab.hover("a.dot[href='#trial-1'] .mark")
    assert tab.run(TIP) == words
    assert tab.run("document.getElementById('trial-1').className") == "lit"
    tab.hover("h1")
    assert tab.run(TIP) == "" and tab.run("document.getElementById('trial-1').className") == ""
    tab.run("document.querySelector('a.dot').focus()")
    assert tab.run(TIP).startswith("Trial 0, ")
    tab.press("Tab")
    assert tab.run(TIP) == words, "the next point is one key away"


def test_pictures_need_no_script(tab: Tab, pages: dict[str, Path]) -> None:
    tab.send("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(pages["sweep"])
        assert tab.run("document.documentElement.dataset.ready") is None
        assert tab.run("document.querySelector('.front .stairs').getTotalLength()") > 100
        assert tab.run("document.querySelectorAll('a.dot title').length") == 3, "the browser's own tips"
    finally:
        tab.send("Emulation.setScriptExecutionDisabled", value=False)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_marks_differ_without_colour(scheme: str, tab: Tab, pages: dict[str, Path]) -> None:
    tab.open(pages["run"], prefers_color_scheme=scheme)
    paint = "getComputedStyle(document.querySelector('pre mark'))"
    assert tab.run(f"{paint}.textDecorationLine") == "underline"
    fills = tab.run("[...document.querySelectorAll('.bars .segment')].map(part => part.getAttribute('fill'))")
    patterns = tab.run(
        "Object.fromEntries([...document.querySelectorAll('.defs pattern')].map(p => [`url(#${p.id})`, "
        "(p.getAttribute('patternTransform') ?? '') + p.getAttribute('width') + [...p.children].slice(1).map(c => "
        "c.outerHTML).join()]))"
    )
    used = {patterns[fill] for fill in fills}
    assert len(used) == len(set(fills)) == 8, "each term has a pattern of its own"
    ink, paper = tab.run("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    assert ink != paper
