"""Defines the results of training and evaluation; light to import, since the public API names these types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from raymem.recipe.schema import Recipe

if TYPE_CHECKING:
    from raymem.runs.suggest import Suggestion
    from raymem.tracking import TrackingResult
    from raymem.training.evaluate import Evaluation
    from raymem.training.loop import Outcome
    from raymem.training.predictions import Prediction


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    outcome: Outcome
    """The outcome that the training loop reports."""
    tracking: TrackingResult
    recipe: Recipe
    """The recipe as it was trained: exact revision, directories for demo models."""
    predicted_peak_bytes: int | None = None
    """Predicted peak of a step; None if the recipe has no budget and was not planned before."""
    train_s: float = 0.0
    """Seconds from building the model to the artefact."""
    suggestion: Suggestion | None = None
    """A prompt of the run's own data, to try the artefact with."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the model's own answers, by their source: ``data.eval.math/numeric``; see ``train.score_every``."""
    pushed: str | None = None
    """Address of the commit on the hub, where the recipe's ``export.push_to_hub`` names a repository."""

    @property
    def artifact(self) -> str:
        """Path or URI of the PEFT or model directory."""
        return self.outcome.artifact

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.outcome.steps

    @property
    def loss(self) -> float | None:
        """Training loss of the last step; None if the run was complete already."""
        return self.outcome.loss

    @property
    def eval_loss(self) -> float | None:
        """Loss of the last evaluation; None without evaluation data."""
        return self.outcome.eval_loss

    @property
    def peak_bytes(self) -> int | None:
        """Measured peak of one worker, the highest over all."""
        return self.outcome.peak_bytes

    @property
    def run_id(self) -> str | None:
        """Id of the run in the tracking system."""
        return self.tracking.run_id


@dataclass(frozen=True)
class EvaluationResult:
    """Loss over the recipe's evaluation data."""

    artifact: str
    result: Evaluation
    """Sums and counts over all rows."""
    predictions: Sequence[Prediction] = ()
    """Evaluation examples with what the model says, as many as were asked for."""

    @property
    def loss(self) -> float:
        """Mean cross-entropy per target token, in nats."""
        return self.result.loss

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return self.result.perplexity

    @property
    def num_targets(self) -> int:
        """Target tokens."""
        return self.result.num_targets

    @property
    def by_name(self) -> dict[str, float]:
        """The loss of each name, where the recipe's ``data.eval`` is a mapping of names."""
        return {name: part.loss for name, part in self.result.by_name.items()}
