"""Runs LoRAM from a recipe to a proven adapter of the full model, in stages that are done once.

| stage | result | done when |
|---|---|---|
| prune | ``cache/loram/<key>``, a model directory | it is there: it is renamed into place behind its manifest |
| align | ``loram-aligned-<key>/model``, a run of its own | its model carries a manifest |
| train | ``<name>/adapter``, the recipe's run | ``<name>/loram/train.json`` names the same work |
| recover | ``<name>/recovered``, an adapter of the full model | it names the same adapter and manifest |
| verify, evaluate | figures | ``<name>/loram/verify.json``, ``evaluate.json`` name the same files |

Every key says what a result was made of. A stage that was killed goes on where it was; what is done is not repeated.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from raymem.errors import ModelError, RecipeError
from raymem.methods.loram import (
    Verification,
    recover_adapter,
    verify_recovery,
)
from raymem.methods.loram.pruning.job import describe_job, open_job
from raymem.methods.loram.pruning.prune import Pruning
from raymem.methods.loram.pruning.remote import RemotePruning
from raymem.methods.loram.recover import is_recovery_of
from raymem.recipe.axes import BASES
from raymem.recipe.schema import Recipe
from raymem.runs import demo
from raymem.runs.evaluate import check_has_eval, evaluate_run
from raymem.runs.loram import verify
from raymem.runs.loram.base import is_made, made_model, open_full_model
from raymem.runs.loram.models import PlannedModel, PrunedBase, PrunedModel, PruningSite, beside_full
from raymem.runs.loram.results import (
    RECOVERED,
    here,
    local_result,
    note_alignment,
    record_of,
    weights_sha256,
    whole,
    write_recovery,
)
from raymem.runs.prepare import Split, index_of, prepare_split
from raymem.runs.resolve import locate_again, note_start, on_full_model, resolve
from raymem.runs.resolved import FullModel, ResolvedRun
from raymem.runs.suggest import Suggestion, suggest
from raymem.runs.train import Begin, TrainOptions, build_demo, train
from raymem.storage.checksums import difference
from raymem.storage.errors import writing
from raymem.storage.folders import make_shared, share_published
from raymem.storage.permissions import share
from raymem.storage.publish import digest
from raymem.training.reporter import Listener, Status
from raymem.training.resume_rules import identity_of

log = logging.getLogger(__name__)

FORWARD_LIMIT_BYTES = 16 << 30
"""Size of both models in fp32 up to which a verification runs them unasked."""


class Pipeline:
    """The stages of one recipe.

    Args:
        recipe: with ``base.kind: loram``.
        status: told in words what goes on.
        listeners: get the metric rows of trainings.
        begin: told the number of steps of each training.
        fresh: take the model as the hub has it today, whatever an earlier run of this name began with.
        run: the same recipe, if it is resolved already.
        source: the recipe's file, for tracked runs.

    Raises:
        RecipeError: another kind of base.
        StorageError: the storage cannot be written.
    """

    def __init__(
        self, recipe: Recipe, *, status: Status = log.info, listeners: Sequence[Listener] = (),
        begin: Begin = lambda total_steps: None, fresh: bool = False, run: ResolvedRun | None = None,
        source: Path | None = None,
    ) -> None:  # fmt: skip
        if not BASES.of(recipe).replaces_model:
            raise RecipeError(f"base.kind: {recipe.base.kind} is not pruned; set base: {{kind: loram, ...}}")
        self.storage = recipe.storage.open()
        self.storage.check_writable()
        self.recipe, self.base = recipe, recipe.base
        self.status, self.listeners, self.begin, self.fresh = status, listeners, begin, fresh
        self.run_storage = self.storage.child(recipe.name)
        self.source = source
        self._run = run
        self._ready: PrunedBase | None = None

    def prune(self) -> PrunedBase:
        """Write the pruned model, step by step, on the cluster or in this process.

        Raises:
            RaymemError: see :func:`raymem.methods.loram.pruning.job.open_job` and :meth:`.Backend.run_steps`.
        """
        run = self.resolved(build=self.base.artifact is None)
        site = _site(run)
        if site is None:
            return self.ready()
        pruning = self._pruning(site)
        if pruning.is_committed():
            self.status(f"pruned before: {site.location}")
        else:
            steps = pruning.steps()
            done = sum(map(pruning.is_done, steps))
            self.status(f"pruning {site.source.name}: {len(steps)} steps, {done} of them done before")
            run.backend.run_steps(pruning, self._progress)
            if self.storage.is_local:
                share_published(Path(site.location))
            self.status(f"pruned: {site.location}")
        return beside_full(run, made_model(site.location, site.source, site), site.source)

    def align(self) -> PrunedBase | None:
        """Train the pruned model itself as ``base.align`` says; None if the recipe leaves that out.

        Raises:
            RaymemError: not pruned yet, or see :func:`raymem.runs.train.launch`.
        """
        if self.base.align is None or self.base.artifact is not None:
            return None
        run = self._located()
        site = _site(run)
        assert site is not None
        if site.alignment is None:
            raise ModelError(f"base.align: {site.source.name} is not pruned yet; run: raymem loram prune RECIPE")
        aligning, model = site.alignment.run, site.alignment.model
        if is_made(model):
            self.status(f"aligned before: {model}")
            return beside_full(run, made_model(model, site.source, site), site.source)
        self.status(f"aligning the pruned model (run {aligning.recipe.name})")
        options = TrainOptions(
            listeners=self.listeners, status=self.status, begin=self.begin, source=self.source, group=self.recipe.name
        )
        finished = train(aligning, options, train_data=site.alignment.train_data)
        sources = [source.path for source in finished.recipe.data.train]
        facts = {"run": aligning.recipe.name, "steps": finished.steps, "data": sources}
        note_alignment(aligning.run, model, here(site.location), facts)
        demo.discard_checkpoints(aligning.recipe)
        if self.storage.is_local:
            share_published(Path(model).parent)
        self.status(f"aligned: {model}")
        return beside_full(run, made_model(model, site.source, site), site.source)

    def train(self, *, fresh: bool = False) -> dict[str, Any]:
        """Train the adapter on the pruned model; returns the outcome of the run.

        Args:
            fresh: set an existing run of this name aside and start over.

        Raises:
            RaymemError: not pruned or aligned yet, or see :func:`raymem.runs.train.launch`.
        """
        return self._trained(self._located(), fresh=fresh)

    def recover(self) -> str:
        """Write the adapter of the full model to ``<run>/recovered``; an earlier one of other content is set aside.

        Returns:
            Its directory or address.

        Raises:
            RaymemError: nothing is trained yet, or it cannot be recovered.
        """
        base, adapter, storage = self._with_weights(), self._adapter(), self.run_storage
        out, before = storage.join(RECOVERED), local_result(storage.join(RECOVERED))
        if before is None or not is_recovery_of(before, adapter, base.manifest):
            if storage.exists(RECOVERED):
                self._set_aside(before)
            write_recovery(storage, lambda out: recover_adapter(adapter, base.directory, out, base.source))
        self.status(f"recovered: {out}")
        return out

    def verify(self, *, forward: bool | None = None) -> Verification:
        """Prove the recovery; see :func:`raymem.methods.loram.verify_recovery`.

        Args:
            forward: whether both models run; by default where they take at most 16 GiB in fp32, of each worker where
                workers share them (``scaling.strategy: fsdp2``); else they run on the CPU of this process.

        Raises:
            RaymemError: nothing is recovered yet, or it does not hold.
        """
        base, adapter, recovered = self._with_weights(), self._adapter(), self._recovered()
        scaling = base.run.recipe.scaling
        if forward is None:
            limit_bytes = FORWARD_LIMIT_BYTES * (scaling.least_workers if scaling.shares_model else 1)
            forward = 4 * (base.plan.full.parameters + base.plan.pruned.parameters) <= limit_bytes
        key = digest(
            [
                weights_sha256(adapter),
                weights_sha256(recovered),
                base.manifest.digest,
                base.source.identity,
                forward,
            ]
        )
        before = record_of(self.run_storage, "verify")
        if before.get("key") == key:
            self.status("verified before")
            return Verification(**before["verification"])
        alone = forward and not scaling.shares_model
        checked = verify_recovery(adapter, base.directory, recovered, full=base.source, forward=alone)
        if forward and not alone:
            adapters = self.run_storage.join("adapter"), self.run_storage.join(RECOVERED)
            difference = verify.shared_difference(base.run, base.location, *adapters, self.status)
            checked = dataclasses.replace(checked, logit_difference=difference)
        self.run_storage.write_record("loram/verify.json", {"key": key, "verification": dataclasses.asdict(checked)})
        return checked

    def evaluate(self, *, with_lora: bool = False) -> dict[str, dict[str, Any]]:
        """Evaluation loss of the full and the pruned model, without and with the adapter.

        Args:
            with_lora: also train the same adapter on the full model (run ``<name>-full``) and evaluate that.

        Returns:
            row -> ``loss``, ``num_targets``, and ``scores`` where sources have a ``metric``; stored row by row in
            ``<run>/loram/evaluate.json``.

        Raises:
            RaymemError: nothing is recovered yet, or there are no evaluation data.
        """
        base = self.ready()
        pruned, full = base.run, on_full_model(base.run, self.recipe.name)
        self._adapter(), self._recovered()
        check_has_eval(pruned.recipe)
        rows: dict[str, tuple[ResolvedRun, str]] = {
            "full": (full, "base"),
            "pruned": (pruned, "base"),
            "pruned + adapter": (pruned, self.run_storage.join("adapter")),
            "full + recovered": (full, self.run_storage.join(RECOVERED)),
        }
        if with_lora:
            plain = on_full_model(base.run, f"{self.recipe.name[:58]}-full")
            rows["full + lora"] = full, str(self._trained(plain)["artifact"])
        split = prepare_split(pruned, "eval")
        stored = record_of(self.run_storage, "evaluate")
        results: dict[str, dict[str, Any]] = {}
        for row, (run, artifact) in rows.items():
            content = None if artifact == "base" else weights_sha256(whole(artifact))
            weights = None if run is full else [base.manifest.digest, run.recipe.base.quantize]
            precision = [run.recipe.train.precision, run.recipe.model.dtype]
            metrics = [source.metric for source in run.recipe.data.eval or () if source.metric]
            key = digest([base.source.identity, weights, content, split.key, *precision, *metrics])
            if stored.get(row, {}).get("key") != key:
                self.status(f"evaluating: {row}")
                result = evaluate_run(run, artifact, split, status=self.status)
                stored[row] = {"key": key, "loss": result.loss, "num_targets": result.num_targets}
                stored[row] |= {"scores": scores} if (scores := result.result.judged) else {}
                self.run_storage.write_record("loram/evaluate.json", stored)
            results[row] = {name: value for name, value in stored[row].items() if name != "key"}
        return results

    def suggestion(self) -> Suggestion | None:
        """Return a prompt of the run's data, to try the recovered adapter with."""
        run = self.ready().run
        split: Split = "train" if run.recipe.data.eval is None else "eval"
        section, index = run.recipe.data, index_of(run.recipe.data, run.storage, run.backend)
        return suggest(section, split, prepare_split(run, split), run.tokenizer, run.storage, index)

    def ready(self) -> PrunedBase:
        """Return the base that is trained on, beside the full model; nothing is made.

        Raises:
            ModelError: not pruned or aligned yet, with the command that does it.
        """
        if self._ready is None:
            run = self._located()
            base = run.require_base()
            assert isinstance(base, PrunedModel)
            source = base.source or open_full_model(on_full_model(run, self.recipe.name).recipe)
            self._ready = beside_full(run, base, source)
        return self._ready

    def trainable(self) -> ResolvedRun:
        """Return the run on its pruned model.

        Raises:
            ModelError: not pruned or aligned yet, with the command that does it.
        """
        run = self._located()
        run.require_base()
        return run

    def resolved(self, *, build: bool = False) -> ResolvedRun:
        """Return the run on a base that may still have to be made; with ``build`` a demo model is made on the way.

        Raises:
            RaymemError: see :func:`raymem.runs.resolve.resolve`.
        """
        if self._run is None:
            make = partial(build_demo, status=self.status) if build else None
            self._run = resolve(self.recipe, fresh=self.fresh, build_demo=make, status=self.status)
            note_start(self._run)
        return self._run

    def _located(self) -> ResolvedRun:
        """Return the run on the base that the stages so far have left."""
        self._run = locate_again(self.resolved(), self.status)
        return self._run

    def _trained(self, run: ResolvedRun, *, fresh: bool = False) -> dict[str, Any]:
        """Return the outcome of a run, which is trained unless that very work is recorded as done."""
        base = run.require_base()
        train_data = prepare_split(run, "train")
        values = run.recipe.to_dict()
        sections = [values[name] for name in ("data", "train", "optimizer", "activations", "storage")]
        pruned = None if isinstance(base, FullModel) else base.manifest.digest
        key = digest([identity_of(run.recipe, train_data), pruned, sections])
        before = record_of(run.run, "train")
        there = None if fresh or before.get("key") != key else local_result(before["outcome"]["artifact"])
        if there is not None:
            if (damage := difference(there)) is None:
                self.status(f"trained before: {before['outcome']['artifact']}")
                return dict(before["outcome"])
            log.warning("%s: %s; it is written again", before["outcome"]["artifact"], damage)
        options = TrainOptions(
            fresh=fresh, listeners=self.listeners, status=self.status, begin=self.begin, source=self.source,
            group=self.recipe.name if self.base.align is not None else None,
        )  # fmt: skip
        outcome = train(run, options, train_data=train_data).outcome.to_dict()
        run.run.write_record("loram/train.json", {"key": key, "outcome": outcome})
        return outcome

    def _pruning(self, site: PruningSite) -> Pruning | RemotePruning:
        """Return the pruning of a site, ready for its first step."""
        if not self.storage.is_local:
            described = describe_job(site.source, site.name, self.base.pruning, site.calibration)
            remote = RemotePruning(described, self.storage, site.name)
            if remote.is_committed():
                remote.commit()  # a driver may have been killed before the last of its files was gone
            else:
                remote.begin(site.calibration)
            return remote
        with writing(site.location):
            make_shared(Path(site.location).parent)
        job = open_job(site.source, site.location, self.base.pruning, site.calibration)
        pruning = Pruning(job)
        if not pruning.is_committed():
            for folder in (job.workspace, job.work):  # another user goes on with a job that was killed
                share(folder, writable=True)
        return pruning

    def _with_weights(self) -> PrunedBase:
        """Return the base as :meth:`ready`, with its weights on this node."""
        base = self.ready()
        here(base.location, weights_too=True)
        return base

    def _set_aside(self, before: Path | None) -> None:
        """Give an earlier recovery another name.

        Args:
            before: its files; None if it is not whole.
        """
        number = 1
        while self.run_storage.exists(aside := f"{RECOVERED}.old-{number}"):
            number += 1
        if before is not None and (damage := difference(before)) is not None:
            log.warning("%s: %s; it is recovered again", self.run_storage.join(RECOVERED), damage)
        self.run_storage.rename_dir(RECOVERED, aside)
        self.status(f"the earlier recovery is now {self.run_storage.join(aside)}")

    def _adapter(self) -> Path:
        cure = f"run {self.recipe.name!r} has no result yet; run: raymem loram train RECIPE"
        return whole(self.run_storage.join("adapter"), cure)

    def _recovered(self) -> Path:
        cure = "nothing is recovered yet; run: raymem loram recover RECIPE"
        return whole(self.run_storage.join(RECOVERED), cure)

    def _progress(self, done: int, total: int) -> None:
        if done == total or done % max(1, total // 10) == 0:
            self.status(f"pruning: step {done}/{total}")


def _site(run: ResolvedRun) -> PruningSite | None:
    """Return where the run's model is pruned; None where the recipe names a pruned one."""
    assert isinstance(run.base, PlannedModel | PrunedModel)
    return run.base.site
