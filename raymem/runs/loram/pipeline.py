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
import hashlib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raymem.errors import ModelError, RecipeError, StorageError
from raymem.methods.loram import (
    Manifest,
    Plan,
    PruneOptions,
    Verification,
    mark_aligned,
    plan_pruning,
    read_manifest,
    recover_adapter,
    verify_recovery,
)
from raymem.methods.loram.manifest import MANIFEST
from raymem.methods.loram.pruning.job import open_job
from raymem.methods.loram.pruning.prune import Pruning
from raymem.methods.loram.recover import WEIGHTS, is_recovery_of
from raymem.methods.loram.source import Source
from raymem.recipe.axes import BASES
from raymem.recipe.schema import Recipe
from raymem.runs import demo
from raymem.runs.evaluate import check_has_eval, evaluate_run
from raymem.runs.loram import verify
from raymem.runs.loram.base import open_full_model
from raymem.runs.loram.models import PlannedModel, PrunedModel, PruningSite
from raymem.runs.prepare import Split, prepare_split
from raymem.runs.resolve import locate_again, note_start, on_full_model, resolve
from raymem.runs.resolved import FullModel, ResolvedRun
from raymem.runs.suggest import Suggestion, suggest
from raymem.runs.train import Begin, TrainOptions, build_demo, train
from raymem.storage.checksums import check_files, difference
from raymem.storage.errors import writing
from raymem.storage.folders import make_shared, share_published
from raymem.storage.permissions import share
from raymem.storage.publish import digest
from raymem.storage.storage import Storage
from raymem.training.artifacts.card import write_card
from raymem.training.artifacts.facts import FACTS
from raymem.training.reporter import Listener, Status
from raymem.training.resume_rules import identity_of

log = logging.getLogger(__name__)

FORWARD_LIMIT_BYTES = 16 << 30
"""Size of both models in fp32 up to which a verification runs them unasked."""


@dataclass(frozen=True)
class PrunedBase:
    """A pruned model beside the full one."""

    plan: Plan
    directory: Path
    """The pruned model, aligned if the recipe says so."""
    manifest: Manifest
    source: Source
    """The full model."""
    run: ResolvedRun


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
        StorageError: the storage cannot be written, or is an object store.
    """

    def __init__(
        self, recipe: Recipe, *, status: Status = log.info, listeners: Sequence[Listener] = (),
        begin: Begin = lambda total_steps: None, fresh: bool = False, run: ResolvedRun | None = None,
        source: Path | None = None,
    ) -> None:  # fmt: skip
        if not BASES.of(recipe).replaces_model:
            raise RecipeError(f"base.kind: {recipe.base.kind} is not pruned; set base: {{kind: loram, ...}}")
        self.storage = recipe.storage.open()
        if not self.storage.is_local:
            raise StorageError(
                f"storage.path: {recipe.storage.path} is an object store, and the stages of LoRAM need plain files; "
                "use a directory that every node sees"
            )
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
        with writing(site.directory):
            make_shared(site.directory.parent)
        job = open_job(site.source, site.directory, self.base.pruning, site.calibration)
        pruning = Pruning(job)
        if pruning.is_committed():
            self.status(f"pruned before: {site.directory}")
        else:
            steps = pruning.steps()
            done = sum(map(pruning.is_done, steps))
            self.status(f"pruning {site.source.name}: {len(steps)} steps, {done} of them done before")
            for folder in (job.workspace, job.work):  # another user goes on with a job that was killed
                share(folder, writable=True)
            run.backend.run_steps(pruning, self._progress)
            share_published(site.directory)
            self.status(f"pruned: {site.directory}")
        return _beside_full(run, site.directory, site.source)

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
        if (model / MANIFEST).is_file():
            self.status(f"aligned before: {model}")
            return _beside_full(run, model, site.source)
        self.status(f"aligning the pruned model (run {aligning.recipe.name})")
        options = TrainOptions(listeners=self.listeners, status=self.status, begin=self.begin, source=self.source)
        finished = train(aligning, options, train_data=site.alignment.train_data)
        sources = [source.path for source in finished.recipe.data.train]
        mark_aligned(model, site.directory, {"run": aligning.recipe.name, "steps": finished.steps, "data": sources})
        demo.discard_checkpoints(aligning.recipe)
        share_published(model.parent)
        self.status(f"aligned: {model}")
        return _beside_full(run, model, site.source)

    def train(self, *, fresh: bool = False) -> dict[str, Any]:
        """Train the adapter on the pruned model; returns the outcome of the run.

        Args:
            fresh: set an existing run of this name aside and start over.

        Raises:
            RaymemError: not pruned or aligned yet, or see :func:`raymem.runs.train.launch`.
        """
        return self._trained(self._located(), fresh=fresh)

    def recover(self) -> Path:
        """Write the adapter of the full model to ``<run>/recovered``; an earlier one of other content is set aside.

        Raises:
            RaymemError: nothing is trained yet, or it cannot be recovered.
        """
        base = self.ready()
        adapter, out = self._adapter(), Path(self.run_storage.join("recovered"))
        if out.exists() and not is_recovery_of(out, adapter, base.manifest):
            number = 1
            while (aside := out.with_name(f"recovered.old-{number}")).exists():
                number += 1
            if (damage := difference(out)) is not None:
                log.warning("%s: %s; it is recovered again", out, damage)
            out.rename(aside)
            self.status(f"the earlier recovery is now {aside}")
        for left in out.parent.glob(f".{out.name}.*.tmp"):  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        recover_adapter(adapter, base.directory, out, base.source)
        with writing(out):
            write_card(out)
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
        base, recovered = self.ready(), self._recovered()
        scaling = base.run.recipe.scaling
        if forward is None:
            limit_bytes = FORWARD_LIMIT_BYTES * (scaling.least_workers if scaling.shares_model else 1)
            forward = 4 * (base.plan.full.parameters + base.plan.pruned.parameters) <= limit_bytes
        key = digest(
            [_sha256(self._adapter()), _sha256(recovered), base.manifest.digest, base.source.identity, forward]
        )
        before = _record(self.run_storage, "verify")
        if before.get("key") == key:
            self.status("verified before")
            return Verification(**before["verification"])
        alone = forward and not scaling.shares_model
        checked = verify_recovery(self._adapter(), base.directory, recovered, full=base.source, forward=alone)
        if forward and not alone:
            difference = verify.shared_difference(base.run, self._adapter(), base.directory, recovered, self.status)
            checked = dataclasses.replace(checked, logit_difference=difference)
        self.run_storage.write_record("loram/verify.json", {"key": key, "verification": dataclasses.asdict(checked)})
        return checked

    def evaluate(self, *, with_lora: bool = False) -> dict[str, dict[str, Any]]:
        """Evaluation loss of the full and the pruned model, without and with the adapter.

        Args:
            with_lora: also train the same adapter on the full model (run ``<name>-full``) and evaluate that.

        Returns:
            row -> ``loss``, ``num_targets``; stored row by row in ``<run>/loram/evaluate.json``.

        Raises:
            RaymemError: nothing is recovered yet, or there are no evaluation data.
        """
        base = self.ready()
        pruned, full = base.run, on_full_model(base.run, self.recipe.name)
        adapter, recovered = self._adapter(), self._recovered()
        check_has_eval(pruned.recipe)
        rows: dict[str, tuple[ResolvedRun, str]] = {
            "full": (full, "base"),
            "pruned": (pruned, "base"),
            "pruned + adapter": (pruned, str(adapter)),
            "full + recovered": (full, str(recovered)),
        }
        if with_lora:
            plain = on_full_model(base.run, f"{self.recipe.name[:58]}-full")
            rows["full + lora"] = full, str(self._trained(plain)["artifact"])
        split = prepare_split(pruned, "eval")
        stored = _record(self.run_storage, "evaluate")
        results: dict[str, dict[str, Any]] = {}
        for row, (run, artifact) in rows.items():
            content = None if artifact == "base" else _sha256(Path(artifact))
            weights = None if run is full else [base.manifest.digest, run.recipe.base.quantize]
            precision = [run.recipe.train.precision, run.recipe.model.dtype]
            key = digest([base.source.identity, weights, content, split.key, *precision])
            if stored.get(row, {}).get("key") != key:
                self.status(f"evaluating: {row}")
                result = evaluate_run(run, artifact, split, status=self.status)
                stored[row] = {"key": key, "loss": result.loss, "num_targets": result.num_targets}
                self.run_storage.write_record("loram/evaluate.json", stored)
            results[row] = {name: value for name, value in stored[row].items() if name != "key"}
        return results

    def suggestion(self) -> Suggestion | None:
        """Return a prompt of the run's data, to try the recovered adapter with."""
        run = self.ready().run
        split: Split = "train" if run.recipe.data.eval is None else "eval"
        return suggest(run.recipe.data, split, prepare_split(run, split), run.tokenizer, run.storage)

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
            self._ready = _beside_full(run, base.directory, source)
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
        before = _record(run.run, "train")
        if before.get("key") == key and not fresh and (Path(before["outcome"]["artifact"]) / FACTS).is_file():
            if (damage := difference(before["outcome"]["artifact"])) is None:
                self.status(f"trained before: {before['outcome']['artifact']}")
                return dict(before["outcome"])
            log.warning("%s: %s; it is written again", before["outcome"]["artifact"], damage)
        options = TrainOptions(
            fresh=fresh, listeners=self.listeners, status=self.status, begin=self.begin, source=self.source
        )
        outcome = train(run, options, train_data=train_data).outcome.to_dict()
        run.run.write_record("loram/train.json", {"key": key, "outcome": outcome})
        return outcome

    def _adapter(self) -> Path:
        adapter = Path(self.run_storage.join("adapter"))
        if not (adapter / FACTS).is_file():
            raise ModelError(f"{adapter}: run {self.recipe.name!r} has no result yet; run: raymem loram train RECIPE")
        check_files(adapter, ModelError)
        return adapter

    def _recovered(self) -> Path:
        recovered = Path(self.run_storage.join("recovered"))
        if not (recovered / FACTS).is_file():
            raise ModelError(f"{recovered}: nothing is recovered yet; run: raymem loram recover RECIPE")
        check_files(recovered, ModelError)
        return recovered

    def _progress(self, done: int, total: int) -> None:
        if done == total or done % max(1, total // 10) == 0:
            self.status(f"pruning: step {done}/{total}")


def _site(run: ResolvedRun) -> PruningSite | None:
    """Return where the run's model is pruned; None where the recipe names a pruned one."""
    assert isinstance(run.base, PlannedModel | PrunedModel)
    return run.base.site


def _beside_full(run: ResolvedRun, directory: Path, source: Source) -> PrunedBase:
    """Open a pruned model, with the plan by which it was made of the full one."""
    manifest = read_manifest(directory)
    ratios = manifest.options["layer_ratios"]
    options = PruneOptions(**{**manifest.options, "layer_ratios": None if ratios is None else tuple(ratios)})
    return PrunedBase(plan_pruning(source.config(), options), directory, manifest, source, run)


_RECORDED: dict[str, dict[str, tuple[type, ...]]] = {
    "verify": {"key": (str,), "verification": (dict,)},
    "train": {"key": (str,), "outcome": (dict,)},
}


def _record(run_storage: Storage, stage: str) -> dict[str, Any]:
    name = f"loram/{stage}.json"
    if not run_storage.exists(name):
        return {}
    cure = "delete the file: this stage is then done again"
    return run_storage.read_record(name, _RECORDED.get(stage), cure=cure)


def _sha256(adapter: Path) -> str:
    return hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()
