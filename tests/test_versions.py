"""The windows of versions, and the one file of private names."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import raymem
from raymem import private_apis
from raymem.versions import WINDOWS, Window, newer_than_tested
from tests.compat.__main__ import PARTS, counts
from tests.compat.environments import requirements

ROOT = Path(raymem.__file__).parent.parent
LIBRARIES = tuple(WINDOWS)


def test_the_requirements_begin_where_the_windows_do_and_leave_newer_releases_in() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, window in WINDOWS.items():
        (required,) = (line for line in project["dependencies"] if re.match(rf"{name}\b", line))
        assert f">={window.lowest}" in required, required
        major = int(window.newest.split(".")[0])
        assert re.search(r"<(\d+)", required) is None or f"<{major + 1}" in required, required


def test_what_constraints_pin_lies_in_the_windows() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    for name, window in WINDOWS.items():
        assert not window.is_older(pinned[name]) and not window.is_newer(pinned[name]), name


@pytest.mark.parametrize(
    ("installed", "older", "newer"),
    [("2.10.9", True, False), ("2.11.0", False, False), ("2.15.3+cpu", False, False), ("2.16.0rc1", False, True)],
)
def test_a_window_knows_what_is_older_and_newer(installed: str, older: bool, newer: bool) -> None:
    window = Window("2.11", "2.15")
    assert (window.is_older(installed), window.is_newer(installed)) == (older, newer)


def test_what_is_newer_than_tested_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert newer_than_tested() == []
    monkeypatch.setitem(WINDOWS, "peft", Window("0.1", "0.2"))
    assert newer_than_tested() == [
        f"peft {version('peft')} is newer than what raymem was tested with (0.1 to 0.2); it is used all the same"
    ]


@pytest.mark.parametrize("name", private_apis._NAMES)
def test_every_private_name_is_there(name: str) -> None:
    assert getattr(private_apis, name) is not None


def test_a_private_name_that_a_release_has_not_is_said_with_the_releases_that_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(private_apis._NAMES, "gone", "torch._guards.gone_with_the_wind")
    with pytest.raises(
        ImportError, match=r"torch\._guards\.gone_with_the_wind is not in torch 2\..*; raymem is tested"
    ):
        private_apis.gone  # noqa: B018


def test_importing_the_list_loads_no_library() -> None:
    code = "import sys, raymem.private_apis; print({'torch', 'ray', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


def test_private_modules_of_libraries_are_imported_in_that_file_alone() -> None:
    for path in sorted((ROOT / "raymem").rglob("*.py")):
        if path.name == "private_apis.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch._", "ray._", "peft._")):
                names = [ast.unparse(node)]
            for name in names:
                first, *rest = name.split(".")
                private = [part for part in rest if part.startswith("_") and not part.startswith("__")]
                assert first not in (*LIBRARIES, "torch") or not private, f"{path}: {name}"


def test_the_compatibility_suite_asks_for_the_ends_of_the_windows_and_for_tests_that_exist() -> None:
    assert f"torch=={WINDOWS['torch'].lowest}.*" in requirements("lowest")
    assert f"ray[default,train,tune]=={WINDOWS['ray'].newest}.*" in requirements("newest")
    assert requirements("pinned") == ["-c", str(ROOT / "constraints.txt")]
    missing = [path for paths in PARTS.values() for path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_the_compatibility_suite_counts_what_pytest_reports(tmp_path: Path) -> None:
    xml = tmp_path / "report.xml"
    xml.write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/><testcase classname="a" name="bad"><failure/>'
        '</testcase><testcase classname="a" name="broken"><error/></testcase><testcase classname="b" name="left">'
        '<skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    assert counts(xml) == {"passed": 1, "failed": ["a::bad", "a::broken"], "skipped": {"b::left": "no GPU"}}


def test_the_page_names_the_windows() -> None:
    page = (ROOT / "docs" / "versions.md").read_text()
    for name, window in WINDOWS.items():
        assert re.search(
            rf"^\| {name} \| {re.escape(window.lowest)}\b.* \| {re.escape(window.newest)} ", page, re.MULTILINE
        )
