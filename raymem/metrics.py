"""Judges the answer of a model by a reference: 1 for right, 0 for wrong, or a share between."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raymem.errors import RecipeError

Judge = Callable[[str, str], float]
"""Takes answer and reference, returns a number from 0 to 1."""
REGEX = "regex:"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_MARKS = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Score:
    """The mean of a metric over the answers to a source's examples."""

    where: str
    """The source in the recipe: ``data.eval.math``."""
    metric: str
    value: float
    count: int
    """Answers."""


def exact_match(answer: str, reference: str) -> float:
    """Compare the texts, but for white space."""
    return float(answer.split() == reference.split())


def numeric(answer: str, reference: str) -> float:
    """Compare the last numbers, ``1,000.0`` and ``1000`` being one; without a number in either it is wrong."""
    found, expected = _last_number(answer), _last_number(reference)
    return float(found is not None and found == expected)


def f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, without case, punctuation and articles (SQuAD, 2016)."""
    found, expected = _words(answer), _words(reference)
    shared = sum((Counter(found) & Counter(expected)).values())
    if not found or not expected:
        return float(found == expected)
    return 2 * shared / (len(found) + len(expected))


def rouge_l(answer: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words, by the package rouge-score (Lin, 2004)."""
    scorer = _rouge().RougeScorer(["rougeL"], use_stemmer=False)
    return float(scorer.score(reference, answer)["rougeL"].fmeasure)


_JUDGES: dict[str, Judge] = {"exact_match": exact_match, "numeric": numeric, "f1": f1, "rougeL": rouge_l}


def problem(metric: str) -> str | None:
    """Say why a metric is none, and what to do; None where it is one."""
    if metric.startswith(REGEX):
        try:
            groups = re.compile(metric.removeprefix(REGEX)).groups
        except re.error as error:
            return f"{metric} is no regular expression ({error}); correct it"
        return f"{metric} has {groups} groups, and one is compared; use (?:...) for others" if groups > 1 else None
    if metric not in _JUDGES:
        return f"{metric!r} is no metric; known are {', '.join(_JUDGES)} and {REGEX}PATTERN"
    return None


def judge_of(metric: str) -> Judge:
    """Return the function of a metric; of ``regex:PATTERN`` it compares the last matches, of the group if there is one.

    Raises:
        RecipeError: its library is not installed.
    """
    if metric == "rougeL":
        _rouge()
    return _by_pattern(metric.removeprefix(REGEX)) if metric.startswith(REGEX) else _JUDGES[metric]


def scores(where: str, metrics: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[Score]:
    """Judge answers by their references.

    Args:
        pairs: answer and reference of each example.
    """
    judges = {metric: judge_of(metric) for metric in metrics}
    return [
        Score(where, metric, sum(judge(*pair) for pair in pairs) / max(1, len(pairs)), len(pairs))
        for metric, judge in judges.items()
    ]


def _by_pattern(pattern: str) -> Judge:
    compiled = re.compile(pattern)

    def judge(answer: str, reference: str) -> float:
        found, expected = compiled.findall(answer), compiled.findall(reference)
        return float(bool(found) and bool(expected) and found[-1] == expected[-1])

    return judge


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_MARKS)).split()


def _rouge() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise RecipeError("metric: rougeL needs the package rouge-score; pip install 'raymem[eval]'") from None
    return rouge_scorer
