"""Predicts the peak of a recipe, per term, without its memory and without a GPU; see docs/planner.md."""

from raymem.planner.micro_batch import choose_micro_batch
from raymem.planner.process import Planner, known_plan, plan_many, plan_recipe
from raymem.planner.types import Plan, RowFacts, Target

__all__ = ["Plan", "Planner", "RowFacts", "Target", "choose_micro_batch", "known_plan", "plan_many", "plan_recipe"]
