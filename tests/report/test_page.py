"""The page about runs and sweeps, as text: what it shows, that nothing in it can run, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raymem.errors import PlanError
from raymem.report import facts
from raymem.report.compare import differences
from raymem.report.curves import means, thinned
from raymem.report.drawing import MARKERS, axis
from raymem.runs.record import DATA, PLAN, PREDICTIONS, SCORES
from raymem.storage.storage import Storage
from tests.helpers.commands import run_command
from tests.helpers.report_files import EVIL, MIB, finished, write_plan, write_run, write_sweep

Report = Callable[..., "Page"]


class Page(HTMLParser):
    """A page taken apart: its tags with attributes, and the text in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.inline: dict[str, str] = {}
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._in.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._in and tag == self._in[-1]:
            self._in.pop()

    def handle_data(self, data: str) -> None:
        if self._in:
            self.inline[self._in[-1]] = self.inline.get(self._in[-1], "") + data
        else:
            self.words += data

    def all(self, tag: str, class_: str = "") -> list[dict[str, str | None]]:
        wanted = set(class_.split())
        return [attrs for name, attrs in self.tags if name == tag and wanted <= set((attrs.get("class") or "").split())]


@pytest.fixture
def report(tmp_path: Path) -> Report:
    def make(*arguments: object) -> Page:
        file = tmp_path / "out.html"
        done = run_command("report", *arguments, "--html", file)
        assert done.returncode == 0, done.stderr
        assert str(file) in done.stdout
        return Page(file.read_text())

    return make


def refused(*arguments: object) -> str:
    done = run_command("report", *arguments)
    assert done.returncode == 1, done.stdout
    return done.stderr


def test_the_page_of_a_run_has_all_that_it_left(report: Report, tmp_path: Path) -> None:
    page = report(write_run(tmp_path))
    assert len(page.all("svg", "chart")) == 4, "loss and evaluation together, learning rate, norm, speed"
    names = [group["data-name"] for group in page.all("g", "series")]
    assert {"training", "evaluation", "Learning rate"} <= set(names)
    assert len(page.all("mark")) == 2, "the legend and the target"
    for words in (
        "40 steps", "90.00 MiB", "1.12 % more than predicted", "context the answer", "12 more characters",
        "100 dropped of the answer.jsonl: because the answer", "prediction: the answer", "reference: the answer",
        "rank: 4", "read as the answer",
    ):  # fmt: skip
        assert words in page.words, words
    terms = [fill for attrs in page.all("rect", "segment") if (fill := attrs.get("fill"))]
    assert len(terms) > 11, "seven predicted, four measured, and the legend"
    assert "gradients + activations + loss + workspace" in page.words
    assert "45.00 MiB" in page.words, "90 of the peak less 30, 5 and 10 that are kept"


def test_what_was_judged_on_the_way_has_its_curve(report: Report, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    assert "data.eval.math/numeric" not in report(run).words
    scores = {"10": {"data.eval.math/numeric": 0.25}, "40": {"data.eval.math/numeric": 0.5}}
    Storage.open(str(run)).write_record(SCORES, scores)
    assert "data.eval.math/numeric" in report(run).words


def test_pruned_and_full_model_are_compared(report: Report, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    rows = {"full": {"loss": 3.0, "key": "a"}, "full + recovered": {"loss": 2.875, "key": "b"}}
    Storage.open(str(run)).write_record("loram/evaluate.json", rows)
    page = report(run)
    assert "full + recovered" in page.words and "-0.1250" in page.words and "sha256" not in page.words


def test_the_page_loads_nothing_and_allows_only_its_own_texts(report: Report, tmp_path: Path) -> None:
    page = report(write_run(tmp_path))
    policy = next(str(meta["content"]) for meta in page.all("meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        assert len(page.all(tag)) == 1
        digest = base64.b64encode(hashlib.sha256(page.inline[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    for name, attrs in page.tags:
        assert "src" not in attrs and "style" not in attrs, (name, attrs)
        assert not [attribute for attribute in attrs if attribute.startswith("on")], (name, attrs)
        assert (attrs.get("href") or "#").startswith("#")


def test_text_of_others_stays_text(report: Report, tmp_path: Path) -> None:
    run = write_run(tmp_path / EVIL.replace("/", "_"), text=EVIL, model={"name": EVIL}, seed=7)
    other = write_run(tmp_path, "other", text=EVIL)
    sweep = write_sweep(
        tmp_path, trials=[finished(0, 3.0, 60) | {"point": {"model.name": EVIL}, "problem": EVIL},
                          finished(1, 2.0, 70) | {"status": "refused", "problem": EVIL, "point": {EVIL: 1}}]
    )  # fmt: skip
    for page in (report(run), report(run, other), report(sweep)):
        assert not page.all("img") and not page.all("b")
        assert len(page.all("script")) == 1
        assert EVIL in page.words
        assert page.source.rstrip().endswith("</html>")


def test_characters_that_hide_are_written_out(report: Report, tmp_path: Path) -> None:
    page = report(write_run(tmp_path, text="\x1b[31m\u202e\x00\ud83d"))
    assert r"\x1b[31m\u202e\x00\ud83d" in page.words
    assert not {"\x1b", "\u202e", "\x00"} & set(page.source)


def test_runs_are_compared_by_dashes_and_markers(report: Report, tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"run-{n}", slope=1 / (n + 1), optimizer={"lr": 10.0**-n}) for n in range(8)]
    page = report(*runs)
    lines = [group for group in page.all("g", "series") if "faint" not in str(group["class"])]
    assert len(page.all("svg", "chart")) == 5
    assert len(lines) == 5 * 8
    assert {str(line["class"]).split()[1] for line in lines} == {f"s{n}" for n in range(8)}
    markers = {str(attrs["d"]) for attrs in page.all("path", "marker")}
    assert markers == set(MARKERS)
    dashes = re.findall(r"\.s\d \.line \{ stroke-dasharray: ([^;]+);", page.inline["style"])
    assert len(set(dashes)) == 7, "and one is drawn through"
    assert "optimizer.lr" in page.words and "train.global_batch" not in page.words
    assert len(page.all("rect", "segment")) > 8 * 11


def test_more_than_eight_are_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, f"run-{n}", steps=2) for n in range(9)]
    page = tmp_path / "page.html"
    assert "9 runs are more than the 8 that one page compares" in refused(*runs, "--html", page)
    assert not page.exists()


def test_the_page_of_a_sweep_has_front_table_and_reasons(report: Report, tmp_path: Path) -> None:
    page = report(write_sweep(tmp_path))
    best, others = page.all("a", "dot best"), page.all("a", "dot other")
    assert [dot["href"] for dot in best] == ["#trial-0", "#trial-1"]
    assert [dot["href"] for dot in others] == ["#trial-2"]
    assert best[1]["aria-label"] == (
        "Trial 1, on the Pareto front: evaluation loss 2.5, peak 80.00 MiB. adapter.rank=2"
    )
    assert "-s adapter.rank=2" in page.words and not page.all("svg", "chart")
    rows = [attrs["id"] for attrs in page.all("tr") if "id" in attrs]
    assert rows == ["trial-0", "trial-1", "trial-2", "trial-3"]
    for words in (
        "loss is not finite", "adapter.rank: 32 is too large", "more than the budget of 100.00 MiB", "130.00 MiB",
        "1 refused proposal needs more than this picture shows", "# the best", "report/best.yaml",
    ):  # fmt: skip
        assert words in page.words, words


def test_the_trials_on_the_front_have_their_curves_and_recipes(report: Report, tmp_path: Path) -> None:
    for number in range(3):
        write_run(tmp_path, f"sweep-ab-{number:04d}", optimizer={"lr": 0.125 + number})
    page = report(write_sweep(tmp_path))
    assert {group["data-name"] for group in page.all("g", "series")} == {"trial 0", "trial 1"}
    assert len(page.all("svg", "chart")) == 2, "loss and evaluation loss"
    assert "lr: 0.125" in page.words and "lr: 1.125" in page.words and "lr: 2.125" not in page.words


def test_a_sweep_without_a_finished_trial_says_so(report: Report, tmp_path: Path) -> None:
    page = report(write_sweep(tmp_path, trials=[]))
    assert "No trial has finished yet" in page.words and "Nothing was refused" in page.words


def test_what_a_run_does_not_hold_is_said(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path)
    for name in (DATA, PLAN, PREDICTIONS):
        (run / name).unlink()

    def cannot(*_: Any, **__: Any) -> Any:
        raise PlanError("planning <took> too long")

    monkeypatch.setattr(facts, "plan_many", cannot)
    page = report(run)
    assert "There is no prediction: planning <took> too long" in page.words
    assert "None recorded; raymem evaluate RECIPE makes them" in page.words
    assert "Not recorded: the run has no data.json" in page.words
    assert "measured" in page.words and len(page.all("svg", "chart")) == 4
    (run / "metrics.jsonl").write_bytes(b"")
    (run / "adapter" / "raymem.json").unlink()
    page = report(run)
    assert "No step is recorded yet" in page.words and "it has no recipe yet" in page.words


def test_a_run_is_found_by_recipe_result_and_name(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = write_run(tmp_path / "raymem-runs", "mine")
    write_sweep(tmp_path / "raymem-runs", "other-sweep")
    recipe = "model: {name: demo}\ndata: {train: 'demo:text'}\ntrain: {steps: 1}\n"
    Path("mine.yaml").write_text(recipe)
    Path("other.yaml").write_text(recipe)
    title = "mine - raymem report"
    for named in ("mine.yaml", run, f"{run}/", run / "adapter", "mine", f"file://{run}"):
        assert title in report(named).source, named
    assert "Pareto front" in report("other.yaml").words
    assert title in report("other.yaml", "-s", "name=mine").source


def test_what_cannot_be_shown_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "raymem-runs"
    run, sweep = write_run(runs, "mine"), write_sweep(runs, "searched")
    Path("new.yaml").write_text("model: {name: demo}\ndata: {train: 'demo:text'}\ntrain: {steps: 1}\n")
    page = tmp_path / "page.html"
    for arguments, words in (
        (["missing"], "missing: there is no such directory; give a recipe"),
        ([runs], "neither a run nor a sweep: it holds none of metrics.jsonl, checkpoints/ and sweep.json; give one of "
                 "those in it: mine, searched"),
        (["new.yaml"], "new.yaml: there is no run 'new' in"),
        (["gone.yaml"], "gone.yaml: no such recipe file"),
        ([run, sweep], "searched: is a sweep, which has a page of its own"),
        ([run, "-s", "seed=1"], "--set seed=1: changes a recipe, and none was given"),
    ):  # fmt: skip
        assert words in refused(*arguments, "--html", page), words
        assert not page.exists()
    assert "is a directory; give the name of a file" in refused(run, "--html", tmp_path)
    assert "cannot be written: No such file or directory" in refused(run, "--html", tmp_path / "no" / "page.html")
    (sweep / "report" / "trials.json").unlink()
    assert "the sweep has no report yet" in refused(sweep, "--html", page)
    (run / "data.json").write_text("{}")
    assert "data.json" in refused(run, "--html", page)
    assert not list(tmp_path.glob(".*.part"))


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    write_plan(Storage.open(str(run)))
    (run / PLAN).write_text((run / PLAN).read_text().replace(str(100 * MIB), "1"))
    assert "plan.json has other values than were written" in refused(run, "--html", tmp_path / "page.html")


def test_long_curves_keep_their_ends_and_extremes() -> None:
    points = [(float(step), float(step % 97)) for step in range(10_000)]
    points[4321] = (4321.0, 500.0)
    points[7654] = (7654.0, -500.0)
    kept = thinned(points)
    assert len(kept) <= 400 + 2
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert points[4321] in kept and points[7654] in kept
    assert kept == sorted(kept)


def test_means_are_of_the_steps_before() -> None:
    assert means([(1, 2.0), (2, 4.0), (3, 9.0)], 2) == [(1, 2.0), (2, 3.0), (3, 6.5)]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 10.0], ["0", "2", "4", "6", "8", "10"]),
        ([5.6, 5.75], ["5.60", "5.65", "5.70", "5.75"]),
        ([3.0, 3.0], ["2.6", "2.8", "3.0", "3.2", "3.4"]),
        ([0.0, 4e-5], ["0", "1e-5", "2e-5", "3e-5", "4e-5"]),
        ([-1.0, 1.0], ["-1.0", "-0.5", "0", "0.5", "1.0"]),
    ],
)
def test_ticks_are_round(values: list[float], labels: list[str]) -> None:
    found = axis(values, 0, 100)
    assert [tick.label for tick in found.ticks] == labels
    assert all(0 <= found.place(value) <= 100 for value in values)


def test_only_differences_of_recipes_are_shown() -> None:
    one = {"name": "a", "optimizer": {"lr": 1, "kind": "adamw"}, "data": {"train": [{"path": "x"}]}, "budget": None}
    two = {"name": "b", "optimizer": {"lr": 2, "kind": "adamw"}, "data": {"train": [{"path": "y"}]}}
    assert [(row.path, row.values) for row in differences([one, two])] == [
        ("optimizer.lr", ["1", "2"]),
        ("data.train[0].path", ["x", "y"]),
        ("budget", ["null", "-"]),
    ]


def test_a_run_on_an_object_store_is_shown(report: Report, tmp_path: Path, s3_uri: str) -> None:
    store = Storage.open(s3_uri)
    run = write_run(tmp_path)
    store.upload_dir(run, "run", last="metrics.jsonl")
    page = report(store.join("run"))
    assert "run - raymem report" in page.source and "40 steps" in page.words
    assert "40 steps" in report(store.join("run", "adapter")).words
    assert "give one of those in it: run" in refused(s3_uri, "--html", tmp_path / "other.html")
