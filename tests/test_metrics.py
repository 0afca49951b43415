"""Answers are judged as people would."""

from __future__ import annotations

import math
import sys

import pytest

from raymem.errors import RecipeError
from raymem.metrics import judge_of, problem, scores


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "value"),
    [
        ("exact_match", " Paris \n", "Paris", 1.0),
        ("exact_match", "paris", "Paris", 0.0),
        ("numeric", "3 + 4 is 7, so #### 1,007", "The result.\n#### 1007", 1.0),
        ("numeric", "it costs $12.50.", "12.5", 1.0),
        ("numeric", "-3", "3", 0.0),
        ("numeric", "no idea", "7", 0.0),
        ("numeric", "no idea", "none either", 0.0),
        ("f1", "The cat sat on the mat.", "a cat sat", 2 * 2 / (4 + 2)),
        ("f1", "dogs", "cats", 0.0),
        ("f1", "the", "a", 1.0),
        (r"regex:answer is (\w+)", "first answer is B, no: answer is C", "answer is C", 1.0),
        (r"regex:answer is (\w+)", "answer is B", "answer is C", 0.0),
        (r"regex:[A-D]", "none", "A", 0.0),
    ],
)
def test_a_judge(metric: str, answer: str, reference: str, value: float) -> None:
    assert math.isclose(judge_of(metric)(answer, reference), value)


def test_scores_are_means_with_their_counts() -> None:
    pairs = [("1", "1"), ("2", "1"), ("3", "3"), ("4", "4")]
    numeric, exact = scores("data.eval.math", ["numeric", "exact_match"], pairs)
    assert (numeric.where, numeric.metric, numeric.value, numeric.count) == ("data.eval.math", "numeric", 0.75, 4)
    assert exact.value == 0.75


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ("bleurt", "'bleurt' is no metric; known are exact_match, numeric, f1, rougeL and regex:PATTERN"),
        ("regex:(", r"is no regular expression"),
        ("regex:(a)(b)", "has 2 groups, and one is compared"),
    ],
)
def test_what_is_no_metric_is_named(metric: str, words: str) -> None:
    said = problem(metric)
    assert said is not None and words in said


def test_rouge_by_its_library() -> None:
    pytest.importorskip("rouge_score", reason="rouge-score is not installed: pip install 'raymem[eval]'")
    # The longest common subsequence of 4 and 3 words has 3: 2 * 3 / (4 + 3).
    assert math.isclose(judge_of("rougeL")("the cat sat down", "the cat down"), 6 / 7)


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    with pytest.raises(RecipeError, match=r"rougeL needs the package rouge-score; pip install 'raymem\[eval\]'"):
        judge_of("rougeL")
