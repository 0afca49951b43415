"""The recipe's ``data`` section: the sources of a run, and how they become rows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from raymem.metrics import problem as metric_problem
from raymem.recipe.base import RecipeModel

MAX_EXAMPLE_BYTES = 4 << 20
"""By default, the largest size of an example: a million tokens of English, made in below 1.5 GB of memory."""


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Source(RecipeModel):
    """One source of examples: a file, a directory of files, a Hugging Face data set, or the embedded demo data."""

    path: str
    """.jsonl, .json, .csv, .txt (each also with .gz or .zst) or .parquet file or directory, here or on s3://, gs:// or
    hf://datasets/..., a Hugging Face id, or ``demo:functions`` / ``demo:text``."""
    split: str | None = None
    """Split of a Hugging Face id or of the demo data (by default train), or of files that are named after their split
    as on the Hugging Face hub: ``test.jsonl``, ``data/test-00000-of-00002.parquet``, ``test/a.csv``. Without it a
    directory is read whole if its files are of one split or do not say; if they are of several, ``train`` is read."""
    subset: str | None = None
    """Configuration name of a Hugging Face id."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    format: Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt", "tokens"] = "auto"
    """How a row is read; ``auto`` decides by the column names. ``tokens``: ``input_ids`` as they are, where ``labels``
    (-100: no target; not shifted) and ``attention_mask`` (0: padding, left out) may stand beside."""
    template: Literal["auto", "chat", "none"] = "auto"
    """How a prompt and its answer (``prompt_completion`` in texts, ``alpaca``) become one text: ``chat`` makes them
    turns of the user and the assistant in the tokenizer's chat template; ``none`` takes the texts as they are, an
    instruction and its answer with an empty line between. ``auto``: ``chat`` where the tokenizer has one, but ``none``
    for a prompt that holds its marks (such as ``[INST]``) already. Conversations are always rendered."""
    columns: dict[str, str] = {}
    """Our column name (also ``system``, ``tools``, ``history``) -> the name in the file, for example ``{prompt:
    instruction, completion: output}``."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Reads only the first so many rows, of a directory by the order of its files' names; by default all."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Times each example is seen per epoch; 0.5 takes a fresh random half each epoch. See ``data.mix``."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] | None = None
    """Only in ``data.eval``: sources of one name have an evaluation loss of their own, ``eval_loss/<name>``. Given by
    writing ``data.eval`` as a mapping of names."""

    metric: Annotated[list[str], BeforeValidator(_one_or_many)] = []
    """Only in ``data.eval``, one or a list: how ``raymem evaluate`` judges what the model itself answers.
    ``exact_match``, ``numeric`` (the last number), ``f1`` (words in common), ``rougeL``, ``regex:PATTERN`` (the last
    match)."""

    @model_validator(mode="after")
    def _metrics_are_known(self) -> Source:
        if why := next(filter(None, map(metric_problem, self.metric)), None):
            raise ValueError(f"metric: {why}")
        if self.metric and self.format == "text":
            raise ValueError("metric: format: text has no answers that could be judged; leave metric out")
        return self

    @model_validator(mode="after")
    def _template_goes_with_format(self) -> Source:
        if problem := template_problem(self.template, self.format):
            raise ValueError(problem)
        return self


def template_problem(template: str, row_format: str) -> str | None:
    """Say why ``template`` means nothing for a format, and what to do; None where it does, or the format is open."""
    if template == "none" and row_format in ("messages", "sharegpt"):
        return (
            f"template: none does not go with format: {row_format}: turns become a text only by a chat template; leave "
            "template out, or give the texts as prompt and completion"
        )
    if template == "chat" and row_format in ("text", "tokens"):
        return f"template: chat does not go with format: {row_format}, which has no turns; leave template out"
    return None


def _one_source_or_many(value: Any) -> Any:
    """Make a list of sources of a single path or mapping, and a source of a string."""
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


def _named_sources(value: Any) -> Any:
    """Turn a mapping of names into a list of named sources; a mapping that looks like a source stays a source."""
    if not isinstance(value, dict) or not value or value.keys() & Source.model_fields.keys():
        return value
    named = []
    for name, sources in value.items():
        if sources == []:
            raise ValueError(f"{name}: has no source; give it at least one, or leave it out")
        for source in _one_source_or_many(sources):
            if isinstance(source, dict) and "name" in source:
                raise ValueError(f"{name}: has a name already, the key; leave name={source['name']!r} out")
            named.append({**source, "name": name} if isinstance(source, dict) else source)
    return named


Sources = Annotated[
    list[Source],
    BeforeValidator(_one_source_or_many),
    Field(min_length=1),
]


class Mix(RecipeModel):
    """A source of weight w_i, size n_i makes up w_i n_i^(1/temperature) / sum_j w_j n_j^(1/temperature) of an epoch."""

    by: Literal["rows", "tokens"] = "rows"
    """The unit in which the size n_i of a source and its share are counted: its rows of ``sequence_length`` tokens,
    or the tokens in them without padding."""
    temperature: Annotated[float, Field(gt=0)]
    """1 takes sources by their weight alone, as without ``mix``; more takes relatively more of small sources, and a
    very large one the same from all of equal weight. The length of an epoch stays what it is at 1."""


class DataSection(RecipeModel):
    """The data that the model is trained and evaluated on."""

    train: Sources
    """One source or a list of them."""
    eval: Annotated[Sources, BeforeValidator(_named_sources)] | None = None
    """Sources of the evaluation loss; none means that only the training loss is reported. A mapping of names to sources
    gives one loss per name beside that of all target tokens together: ``{math: a.jsonl, chat: {path: b.jsonl}}``."""
    mix: Mix | None = None
    """Tempered mixing of the training sources, on top of their weights."""
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens per row of a batch."""
    max_example_bytes: Annotated[int, Field(ge=1)] = MAX_EXAMPLE_BYTES
    """Bytes that one example may have in its file, without compression; a longer one is an error before it is read,
    since making tokens of a text takes up to 350 times its memory."""
    max_dropped: Annotated[float, Field(ge=0, le=1)] = 0.5
    """The largest share of a source's examples that may be left out because nothing in them is to be predicted: they
    are cut before their first target by ``sequence_length``, or have none. Above it the data are refused."""
    turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns are trained in a conversation; marks of turns (``weight: 0``) hold as well."""
    packing: Literal["bfd", "wrapped", "none"] = "bfd"
    """``bfd`` packs whole examples best-fit and keeps them apart (refused where a model cannot); ``wrapped`` runs them
    into one stream cut at the row length; ``none`` gives every example its own padded row."""

    @model_validator(mode="after")
    def _named_alike(self) -> DataSection:
        if odd := next((source.name for source in self.train if source.name is not None), None):
            raise ValueError(f"only sources of data.eval have names; leave name={odd!r} out of data.train")
        if odd := next((source.metric[0] for source in self.train if source.metric), None):
            raise ValueError(f"only sources of data.eval have metrics; leave metric: {odd} out of data.train")
        if self.packing == "wrapped" and (odd := next((s.metric[0] for s in self.eval or () if s.metric), None)):
            raise ValueError(
                f"packing: wrapped cuts examples, so that metric: {odd} cannot judge them; use packing: bfd"
            )
        names = [source.name for source in self.eval or ()]
        if None in names and set(names) != {None}:
            raise ValueError("either every source of data.eval has a name or none; write it as a mapping of names")
        return self

    @property
    def score_names(self) -> list[str]:
        """Names of the metrics of answers, as rows of metrics have them: ``data.eval.math/numeric``."""
        return [
            f"{self.path_of('eval', number)}/{metric}"
            for number, source in enumerate(self.eval or ())
            for metric in source.metric
        ]

    def path_of(self, split: Literal["train", "eval"], index: int) -> str:
        """Name the path of a source in the recipe as it was written: ``data.train[0]``, ``data.eval.math``."""
        sources = getattr(self, split)
        name = sources[index].name
        if name is None:
            return f"data.{split}[{index}]"
        alike = [at for at, source in enumerate(sources) if source.name == name]
        return f"data.{split}.{name}" + (f"[{alike.index(index)}]" if len(alike) > 1 else "")
