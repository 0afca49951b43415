"""The recipe: one strict YAML file that says everything about a run.

A recipe is frozen once validated. It travels to the workers as the plain dict of :meth:`Recipe.to_dict`, and the same
dict is stored with every checkpoint and every tracked run. The five *axes* (``base``, ``adapter``, ``activations``,
``loss``, ``optimizer``) are unions told apart by ``kind``; where a kind needs no options its bare name will do
(``adapter: none``). A method of raymem's own brings its options as a dataclass. Which kinds go together is decided in
one place, :mod:`raymem.recipe.compat`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    model_validator,
)
from typing_extensions import TypeAliasType

from raymem.memory.budget import parse_bytes
from raymem.methods.loract.config import LoRActOptions
from raymem.methods.loram.config import LoRAMOptions
from raymem.methods.mlorc.config import MLorcAdamWOptions, MLorcLionOptions
from raymem.methods.moram.config import MoRAMOptions
from raymem.recipe.base import Section
from raymem.recipe.space import Dimension

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


def _shorthand(default: str) -> BeforeValidator:
    """``adapter: none`` means ``adapter: {kind: none}``, and options without a kind are the default kind's."""

    def expand(value: Any) -> Any:
        if isinstance(value, str):
            return {"kind": value}
        return {"kind": default, **value} if isinstance(value, dict) else value

    return BeforeValidator(expand)


class ModelSection(Section):
    """Which model is trained: exactly one of ``name`` and ``config``."""

    name: str | None = None
    """Hugging Face id, local directory, or ``demo`` / ``demo-long`` (built on this machine, no network)."""
    config: dict[str, Any] | None = None
    """A transformers config with its ``model_type``: the model starts from random weights."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id; a run keeps the commit that this meant when it began."""
    tokenizer: str | None = None
    """Hugging Face id, local directory or ``demo``; by default the model's own."""
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


class Source(Section):
    """One source of examples: a file, a directory of files, a Hugging Face data set, or the embedded demo data."""

    path: str
    """.jsonl, .json, .csv or .parquet file or directory, a Hugging Face id, or ``demo:functions`` / ``demo:text``."""
    split: str = "train"
    """Split of a Hugging Face id or of the demo data; ignored for plain files."""
    subset: str | None = None
    """Configuration name of a Hugging Face id."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    format: Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt"] = "auto"
    """How a row is read; ``auto`` decides by the column names."""
    columns: dict[str, str] = {}
    """Our column name (also ``system``, ``tools``, ``history``) -> the name in the file, for example ``{prompt:
    instruction, completion: output}``."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Times each example is seen per epoch; 0.5 takes a fresh random half each epoch."""


def _one_source_or_many(value: Any) -> Any:
    """A single path or mapping stands for a list of one; a string for its path."""
    items = value if isinstance(value, list) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[
    list[Source],
    BeforeValidator(_one_source_or_many),
    Field(min_length=1),
]


class DataSection(Section):
    """What the model is trained and evaluated on."""

    train: Sources
    """One source or a list of them."""
    eval: Sources | None = None
    """Sources of the evaluation loss; none means that only the training loss is reported."""
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens per row of a batch."""
    packing: Literal["bfd", "wrapped", "none"] = "bfd"
    """``bfd`` packs whole examples best-fit and keeps them apart (refused where a model cannot); ``wrapped`` runs them
    into one stream cut at the row length; ``none`` gives every example its own padded row."""


class FullBase(Section):
    """The model as it is."""

    kind: Literal["full"] = "full"
    quantize: Literal["none", "nf4"] = "none"
    """``nf4`` stores the frozen linear layers in 4 bits (bitsandbytes, ``pip install raymem[quant]``)."""


class NoAdapter(Section):
    """Full-parameter training."""

    kind: Literal["none"] = "none"
    freeze: list[str] = []
    """Modules whose weights stay as they are, for example ``[lm_head]``; what is tied to them stays too."""


class LoraAdapter(Section):
    """LoRA through PEFT (Hu et al. 2021)."""

    kind: Literal["lora"] = "lora"
    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Fraction = 0.0
    targets: str | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """``all-linear`` (every linear layer that text passes through but the output head; docs/models.md), or names such
    as ``[q_proj, v_proj]``, or regular expressions for whole module names."""
    init_from: str | None = None
    """PEFT directory whose adapter is continued."""


class NoActivationSaving(Section):
    """Everything that backward needs is kept."""

    kind: Literal["none"] = "none"


class Checkpointing(Section):
    """Gradient checkpointing by transformers: layers are recomputed in backward."""

    kind: Literal["checkpoint"] = "checkpoint"


class AutoLoss(Section):
    """``chunked`` where it is right for the model, which is tried on a small clone; else ``full``, with a warning."""

    kind: Literal["auto"] = "auto"


class ChunkedLoss(Section):
    """Exact cross-entropy by chunks of positions: logits of all tokens are never there at once."""

    kind: Literal["chunked"] = "chunked"


class FullLoss(Section):
    """Cross-entropy of the logits of all tokens, held three times in fp32."""

    kind: Literal["full"] = "full"


class AdamW(Section):
    """``torch.optim.AdamW`` (Loshchilov and Hutter 2017)."""

    kind: Literal["adamw"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    implementation: Literal["fused", "foreach"] = "fused"
    """``fused`` needs no temporaries; ``foreach`` holds one copy of the trainable weights while it steps."""


class _FromMapping:
    """Lets a strict dataclass be written as a mapping, as sections are; its fields stay strict."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        schema = handler(source)
        handler.resolve_ref_schema(schema)["strict"] = False  # type: ignore[index]
        return schema


def _tuple(name: str) -> BeforeValidator:
    """YAML has lists only; some options are tuples."""

    def convert(value: Any) -> Any:
        given = value.get(name) if isinstance(value, dict) else None
        return {**value, name: tuple(given)} if isinstance(given, list) else value

    return BeforeValidator(convert)


# Named aliases become named definitions in the JSON schema. A method adds its kinds here and nowhere else in this file.
Base = TypeAliasType(
    "Base",
    Annotated[
        FullBase | Annotated[LoRAMOptions, _FromMapping()],
        Field(discriminator="kind"),
        _tuple("layer_ratios"),
        _shorthand("full"),
    ],
)
Adapter = TypeAliasType(
    "Adapter",
    Annotated[
        NoAdapter | LoraAdapter | Annotated[MoRAMOptions, _FromMapping()],
        Field(discriminator="kind"),
        _shorthand("lora"),
    ],
)
Activations = TypeAliasType(
    "Activations",
    Annotated[
        NoActivationSaving | Checkpointing | Annotated[LoRActOptions, _FromMapping()],
        Field(discriminator="kind"),
        _shorthand("none"),
    ],
)
Loss = TypeAliasType(
    "Loss", Annotated[AutoLoss | ChunkedLoss | FullLoss, Field(discriminator="kind"), _shorthand("auto")]
)
Optimizer = TypeAliasType(
    "Optimizer",
    Annotated[
        AdamW | Annotated[MLorcAdamWOptions, _FromMapping()] | Annotated[MLorcLionOptions, _FromMapping()],
        Field(discriminator="kind"),
        _tuple("betas"),
        _shorthand("adamw"),
    ],
)


class TrainSection(Section):
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
    save_every: Positive | None = None
    """Steps between checkpoints; by default one tenth of the run. The last step is always saved."""

    @property
    def rows_per_pass(self) -> int:
        """``micro_batch``, once it is a number."""
        assert self.micro_batch != "auto", "settle_micro_batch comes first"
        return self.micro_batch

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        return self


class ScalingSection(Section):
    """How many workers and what each one gets."""

    num_workers: Annotated[int, Field(ge=0)] | Annotated[tuple[Positive, Positive], Field(strict=False)] = 1
    """0 trains in this process without Ray; ``[min, max]`` is elastic."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    use_gpu: bool = False
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] | None = None
    """Ray resources; by default one GPU, or an equal share of all CPU cores."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker crashes that are survived by restarting from the last checkpoint; -1 is no limit."""

    @model_validator(mode="after")
    def _ordered(self) -> ScalingSection:
        if isinstance(self.num_workers, tuple) and self.num_workers[0] > self.num_workers[1]:
            raise ValueError(f"scaling.num_workers is [min, max], got {list(self.num_workers)}")
        return self


class StorageSection(Section):
    """Where runs, prepared data and caches live: one path that every node sees."""

    path: str = "raymem-runs"
    """Directory, s3:// or gs://; a relative one counts from where the command is started."""
    keep: Literal["last", "best"] = "last"
    """``best`` keeps the checkpoints with the lowest evaluation loss (and always the last one, to resume from)."""
    num_to_keep: Positive = 2


class MlflowTracking(Section):
    """MLflow run, parameters, metrics and the final artefact."""

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    """Tracking server; by default MLFLOW_TRACKING_URI, or else sqlite under the storage path."""
    experiment: str = "raymem"
    register_as: str | None = None
    """Registered model that gets the final adapter or model as a new version."""
    alias: str = "candidate"
    """Alias of that version."""


class NoTracking(Section):
    """Metrics are only printed and written beside the checkpoints."""

    kind: Literal["none"] = "none"


Tracking = TypeAliasType(
    "Tracking", Annotated[MlflowTracking | NoTracking, Field(discriminator="kind"), _shorthand("mlflow")]
)


RESERVED_NAMES = ("cache", "mlartifacts", "mlflow.db", "mlflow.db.lock")
"""What lies beside the runs in a storage path."""


def _not_reserved(name: str) -> str:
    if name in RESERVED_NAMES:
        raise ValueError(f"{name!r} is taken by raymem itself in the storage path; choose another name")
    return name


def _amount(text: str) -> str:
    parse_bytes(text)
    return text


class Recipe(Section):
    """One run, complete."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"), AfterValidator(_not_reserved)]
    """Stable run name: the same name on the same storage resumes. Default: the file's name."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Every random stream derives from it: data order, dropout, adapter start, rounding."""
    model: ModelSection
    """Which model is trained."""
    data: DataSection
    """What it is trained and evaluated on."""
    base: Base = FullBase()
    """Axis 1: how the base weights are held."""
    adapter: Adapter = LoraAdapter()
    """Axis 2: which weights are trained."""
    activations: Activations = NoActivationSaving()
    """Axis 3: what is kept for the backward pass."""
    loss: Loss = AutoLoss()
    """Axis 4: whether the logits of all tokens are there at once."""
    optimizer: Optimizer = AdamW()
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
    tracking: Tracking = MlflowTracking()
    """Where runs are recorded."""
    space: Annotated[dict[str, Dimension], Field(min_length=1)] | None = None
    """Search space of ``raymem sweep``, over paths of this recipe; a single run leaves it aside."""

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON types; ``Recipe.model_validate(recipe.to_dict()) == recipe``."""
        return self.model_dump(mode="json")
