"""Plans recipes in a process of its own: it patches libraries, and some model code ends the process that traces it.

Run as ``python -m raymem.planner.subprocess_main FD``; started by :mod:`raymem.planner.process` alone.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

from raymem.errors import RaymemError
from raymem.planner.shapes import located
from raymem.planner.tracing.imports import compiler_is_put_off, do_without
from raymem.planner.types import Above, Plan, RowFacts, Target
from raymem.recipe.axes import register_again
from raymem.recipe.schema import Recipe

if TYPE_CHECKING:
    from raymem.planner.tracing.step_trace import StepTrace


def main(output: int) -> None:
    """Answer jobs, a JSON line each, until the input ends.

    Args:
        output: file descriptor of the answers.
    """
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)
    gc.disable()  # looking for garbage among that many objects takes a third of a plan's time
    do_without()
    with os.fdopen(output, "w") as answers:
        for line in sys.stdin:
            answers.write(json.dumps(answer(json.loads(line))) + "\n")
            answers.flush()
            gc.collect()  # while nobody waits
            gc.freeze()  # imports and the fake-operation cache survive; later collections skip them


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"plan": ...}``, ``{"above": ...}`` the limit, or ``{"error": [type, text]}`` of a user's error.

    Args:
        job: ``recipe``, ``gpu``, ``rows`` if known, ``problem`` if tracing has failed before, and ``limit_bytes`` if a
            plan above it is of no use; ``kinds`` that are not raymem's own.
    """
    began = time.perf_counter()
    register_again(job.get("kinds", {}))
    recipe = Recipe.model_validate(job["recipe"])
    target = Target.of(recipe)
    try:
        recipe, shipped = located(recipe)
        plan = _rough(recipe, target, job) if job["problem"] else _traced(recipe, target, job)
    except RaymemError as error:
        return {"error": [type(error).__name__, str(error)]}
    if isinstance(plan, Above):
        return {"above": dataclasses.asdict(plan), "config_note": shipped}
    seconds = round(time.perf_counter() - began, 2)
    source = "model" if shipped is None else "shipped"
    plan = dataclasses.replace(plan, seconds=seconds, config_source=source, config_note=shipped)
    return {"plan": plan.to_dict(), "config_note": shipped}


def _traced(recipe: Recipe, target: Target, job: dict[str, Any]) -> Plan | Above:
    from raymem.memory.trace import LimitPassed
    from raymem.planner.plan import make_plan, outside_bytes

    limit, outside = job.get("limit_bytes"), outside_bytes(target, job["gpu"])
    rows = None if job["rows"] is None else RowFacts(**job["rows"])
    try:
        session = _session(recipe, target, rows, None if limit is None else limit - outside)
        return make_plan(session, target, job["gpu"])
    except LimitPassed as passed:
        return Above(passed.num_bytes + outside, passed.phase)
    except RaymemError:
        raise
    except Exception as error:  # model code may raise anything
        return _rough(recipe, target, {**job, "problem": describe(error)})


def _session(recipe: Recipe, target: Target, rows: RowFacts | None, limit_bytes: int | None) -> StepTrace:
    """A session within which the compiler had to be loaded is held again: loading keeps tensors of the step alive."""
    from raymem.planner.tracing.step_trace import trace_step

    put_off = compiler_is_put_off()
    try:
        session = trace_step(recipe, target, rows, limit_bytes)
    except RaymemError:
        raise
    except Exception:
        if put_off == compiler_is_put_off():
            raise
    else:
        if put_off == compiler_is_put_off():
            return session
    gc.collect()
    return trace_step(recipe, target, rows, limit_bytes)


def describe(error: Exception) -> str:
    """Name the operation that cannot be traced, if that is what went wrong, else the error."""
    operation = getattr(error, "func", None)
    if operation is not None:
        return f"{operation} decides by values, which a planned step has not"
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {text}"


def _rough(recipe: Recipe, target: Target, job: dict[str, Any]) -> Plan:
    """Make a rough plan of closed forms, and a formula for activations."""
    from raymem.memory import devices
    from raymem.memory.trace import CATEGORIES
    from raymem.planner.analytic import closed_form, rough_activations, rough_loss
    from raymem.planner.tracing.step_trace import planned_model
    from raymem.training.loss import loss_of
    from raymem.training.model.build import load_config

    model, config = planned_model(recipe), load_config(recipe)
    state = closed_form(recipe, target, model)
    passing = {
        "activations": rough_activations(recipe, config),
        "loss": rough_loss(recipe, config, loss_of(model)),
    }
    terms = dict.fromkeys(CATEGORIES, 0) | state | passing
    peak = sum(terms.values())
    facts = devices.gpu_facts(job["gpu"])
    outside = facts.context_bytes + 2 * facts.cublas_bytes if target.kind == "cuda" else 0
    return Plan(
        device=target.kind, gpu=job["gpu"], num_workers=target.num_workers, traced=False, note=job["problem"],
        peak_bytes=peak, step_peak_bytes=peak, terms=terms, term_peaks=terms, phases={}, state=state,
        reserved_bytes=peak, capacity_bytes=peak + outside, expandable_bytes=peak, outside_bytes=outside,
        top=[], timeline=[],
    )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
