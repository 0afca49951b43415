"""Predicts the peak of a recipe, per term, without its memory and without a GPU; see docs/planner.md."""

from raymem.planner.process import known_plan, plan_many, plan_recipe
from raymem.planner.values import Plan, Target

__all__ = ["Plan", "Target", "known_plan", "plan_many", "plan_recipe"]
