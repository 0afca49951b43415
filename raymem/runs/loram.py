"""LoRAM from a recipe to a proven adapter of the full model: stages that are done once.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raymem.errors import ModelError, RecipeError, StorageError
from raymem.methods.loram import (
    LoRAMOptions,
    Manifest,
    Plan,
    Verification,
    mark_aligned,
    plan_pruning,
    read_manifest,
    recover_adapter,
    verify_recovery,
)
from raymem.methods.loram.job import is_committed, open_job
from raymem.methods.loram.manifest import MANIFEST
from raymem.methods.loram.prune import finish_job
from raymem.methods.loram.recover import WEIGHTS, is_recovery_of
from raymem.methods.loram.source import Source
from raymem.methods.loram.steps import is_done, steps
from raymem.recipe.axes import full_base
from raymem.recipe.schema import Recipe
from raymem.runs import demo, loram_base
from raymem.runs.prepare import prepare_split, shared_tokenizer
from raymem.runs.train import launch
from raymem.storage.publish import digest
from raymem.storage.storage import Storage
from raymem.training.artifacts.export import FACTS
from raymem.training.job import Ready
from raymem.training.model.revision import Began, began_with, on_hub, record, resolve
from raymem.training.reporter import Listener
from raymem.training.resume_rules import identity_of

log = logging.getLogger(__name__)

Status = Callable[[str], None]
FORWARD_LIMIT_BYTES = 16 << 30
"""Both models in fp32, up to which a verification runs them unless it is told to."""


@dataclass(frozen=True)
class Pruned:
    """What the stages before training left."""

    plan: Plan
    directory: Path
    """Of the pruned model, aligned if the recipe says so."""
    manifest: Manifest
    source: Source
    """The full model."""
    recipe: Recipe
    """As it is trained: on that directory."""


class Pipeline:
    """The stages of one recipe.

    Args:
        recipe: with ``base.kind: loram``.
        status: told in words what goes on.
        listeners: get the metric rows of trainings.
        fresh: take the model as the hub has it today, whatever an earlier run of this name began with.

    Raises:
        RecipeError: another kind of base.
        StorageError: the storage cannot be written, or is an object store.
        ClusterError: Ray cannot be reached (with ``scaling.num_workers: 0`` it is not asked).
    """

    def __init__(
        self, recipe: Recipe, *, status: Status = log.info, listeners: Sequence[Listener] = (), fresh: bool = False
    ) -> None:
        if not isinstance(recipe.base, LoRAMOptions):
            raise RecipeError(f"base.kind: {recipe.base.kind} is not pruned; set base: {{kind: loram, ...}}")
        self.storage = Storage.open(recipe.storage.path)
        if not self.storage.is_local:
            raise StorageError(
                f"storage.path: {recipe.storage.path} is an object store, and the stages of LoRAM need plain files; "
                "use a directory that every node sees"
            )
        self.storage.check_writable()
        self.recipe, self.base = recipe, recipe.base
        self.status, self.listeners, self.fresh = status, listeners, fresh
        self.on_ray = recipe.scaling.num_workers != 0
        self.run_storage = self.storage.child(recipe.name)
        self._place: loram_base.Place | None = None
        self._ready: Pruned | None = None
        self._connected = False

    def prune(self) -> Pruned:
        """Write the pruned model, step by step, on the cluster or in this process.

        Raises:
            RaymemError: see :func:`raymem.methods.loram.job.open_job` and :func:`.loram_prune.prune_on_ray`.
        """
        if self.base.artifact is not None:
            return self.ready()
        place = self.find(build=True)
        job = open_job(place.source, place.pruned, self.base.pruning, place.calibration)
        if is_committed(job):
            self.status(f"pruned before: {place.pruned}")
        else:
            total = len(steps(job))
            done = sum(is_done(job, step) for step in steps(job))
            self.status(f"pruning {place.source.name}: {total} steps, {done} of them done before")
            if self.on_ray:
                from raymem.cluster.prune import prune_on_ray

                prune_on_ray(job, self._progress)
            else:
                finish_job(job)
            self.status(f"pruned: {place.pruned}")
        return self._pruned(place, place.pruned)

    def align(self) -> Pruned | None:
        """Train the pruned model itself as ``base.align`` says; None if the recipe leaves that out.

        Raises:
            RaymemError: not pruned yet, or see :func:`raymem.runs.train.launch`.
        """
        alignment = None if self.base.artifact is not None else self._alignment()
        if alignment is None:
            return None
        (run, ready), place = alignment, self.find()
        model = loram_base.aligned_model(run, self.storage)
        if (model / MANIFEST).is_file():
            self.status(f"aligned before: {model}")
            return self._pruned(place, model)
        self.status(f"aligning the pruned model (run {run.name})")
        finished = launch(run, listeners=self.listeners, status=self.status, ready=ready)
        facts = {"run": run.name, "steps": finished.outcome.steps, "data": [s.path for s in finished.recipe.data.train]}
        mark_aligned(model, place.pruned, facts)
        demo.discard_checkpoints(run)
        self.status(f"aligned: {model}")
        return self._pruned(place, model)

    def train(self, *, fresh: bool = False) -> dict[str, Any]:
        """Train the adapter on the pruned model; returns the outcome of the run.

        Args:
            fresh: set an existing run of this name aside and start over.

        Raises:
            RaymemError: not pruned or aligned yet, or see :func:`raymem.runs.train.launch`.
        """
        if self.base.artifact is not None:  # the full weights need not be on this machine
            recipe = demo.resolve(self.recipe, self.storage)
            known = self._ready
            manifest = loram_base.check_artifact(recipe, self.base.artifact) if known is None else known.manifest
            return self._trained(recipe, manifest.digest, fresh=fresh)
        base = self.ready()
        return self._trained(base.recipe, base.manifest.digest, fresh=fresh)

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
            out.rename(aside)
            self.status(f"the earlier recovery is now {aside}")
        for left in out.parent.glob(f".{out.name}.*.tmp"):  # of a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        recover_adapter(adapter, base.directory, out, base.source)
        self.status(f"recovered: {out}")
        return out

    def verify(self, *, forward: bool | None = None) -> Verification:
        """Prove the recovery; see :func:`raymem.methods.loram.verify_recovery`.

        Args:
            forward: whether both models run; by default where they take at most 16 GiB in fp32.

        Raises:
            RaymemError: nothing is recovered yet, or it does not hold.
        """
        base, recovered = self.ready(), self._recovered()
        if forward is None:
            forward = 4 * (base.plan.full.parameters + base.plan.pruned.parameters) <= FORWARD_LIMIT_BYTES
        key = digest(
            [_sha256(self._adapter()), _sha256(recovered), base.manifest.digest, base.source.identity, forward]
        )
        found = _record(self.run_storage, "verify")
        if found.get("key") == key:
            self.status("verified before")
            return Verification(**found["verification"])
        checked = verify_recovery(self._adapter(), base.directory, recovered, full=base.source, forward=forward)
        self.run_storage.write_json("loram/verify.json", {"key": key, "verification": dataclasses.asdict(checked)})
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
        from raymem.runs.evaluate import evaluate_recipe

        base = self.ready()
        full = base.recipe.model_copy(update={"base": full_base()})
        adapter, recovered = self._adapter(), self._recovered()
        rows: dict[str, tuple[Recipe, str]] = {
            "full": (full, "base"),
            "pruned": (base.recipe, "base"),
            "pruned + adapter": (base.recipe, str(adapter)),
            "full + recovered": (full, str(recovered)),
        }
        if with_lora:
            run = full.model_copy(update={"name": f"{full.name[:58]}-full"})
            rows["full + lora"] = full, str(self._trained(run, None)["artifact"])
        tokenizer = shared_tokenizer(base.recipe, self.storage)
        has_eval = base.recipe.data.eval is not None  # else evaluate_recipe says so
        split = prepare_split(base.recipe, "eval" if has_eval else "train", tokenizer, self.storage, on_ray=False)
        stored = _record(self.run_storage, "evaluate")
        results: dict[str, dict[str, Any]] = {}
        for row, (recipe, artifact) in rows.items():
            content = None if artifact == "base" else _sha256(Path(artifact))
            pruned = None if recipe is full else [base.manifest.digest, recipe.base.quantize]
            key = digest([base.source.identity, pruned, content, split.key, recipe.train.precision, recipe.model.dtype])
            if stored.get(row, {}).get("key") != key:
                self.status(f"evaluating: {row}")
                result = evaluate_recipe(recipe, artifact, prepared=split).result
                stored[row] = {"key": key, "loss": result.loss, "num_targets": result.num_targets}
                self.run_storage.write_json("loram/evaluate.json", stored)
            results[row] = {name: value for name, value in stored[row].items() if name != "key"}
        return results

    def ready(self) -> Pruned:
        """What training needs, without doing anything.

        Raises:
            ModelError: not pruned or aligned yet, with the command that does it.
        """
        if self._ready is None:
            if self.base.artifact is not None:
                self._ready = self._given(self.base.artifact)
            else:
                place = self.find()
                directory = loram_base.pruned_model(place, self.storage, on_ray=self.on_ray)
                self._ready = self._pruned(place, directory)
        return self._ready

    def prepared(self, recipe: Recipe) -> Ready:
        """What a run needs on a base that these stages left or checked.

        Raises:
            RaymemError: the tokenizer or the data cannot be read.
        """
        self._connect()
        tokenizer = shared_tokenizer(recipe, self.storage)
        train_data = prepare_split(recipe, "train", tokenizer, self.storage, on_ray=self.on_ray)
        return Ready(self.recipe.model.revision, tokenizer, train_data)

    def find(self, *, build: bool = False) -> loram_base.Place:
        """Where the pruned model lies or will lie; with ``build`` a demo model is made on the way.

        Raises:
            RaymemError: see :func:`.loram_base.find`.
        """
        if self._place is None:
            self._connect()
            self.status("opening the full model")
            if build:
                demo.resolve(self.recipe, self.storage, build=lambda recipe: launch(recipe, status=self.status))
            recipe = resolve(self.recipe, None if self.fresh else began_with(self.run_storage))
            self._place = loram_base.find(recipe, self.storage, on_ray=self.on_ray)
            record(self.run_storage, recipe, self.recipe.model.revision)
        return self._place

    def _connect(self) -> None:
        if self.on_ray and not self._connected:
            from raymem.cluster import connection
            from raymem.cluster.doctor import checks

            self.status("starting Ray")
            connection.connect(self.recipe)
            checks.check_storage_shared(self.storage.path)
            self._connected = True

    def _alignment(self) -> tuple[Recipe, Ready] | None:
        if self.base.align is None:
            return None
        place = self.find()
        if not (place.pruned / MANIFEST).is_file():
            raise ModelError(f"base.align: {place.source.name} is not pruned yet; run: raymem loram prune RECIPE")
        manifest = read_manifest(place.pruned)
        return loram_base.alignment_run(place, self.storage, manifest, on_ray=self.on_ray)

    def _given(self, artifact: str) -> Pruned:
        """A pruned model that the recipe names."""
        recipe = demo.resolve(self.recipe, self.storage)
        source = None if on_hub(recipe.model) else loram_base.full_source(recipe)
        manifest = loram_base.check_artifact(recipe, artifact, source)
        if source is None:
            name, commit = manifest.source["name"], manifest.source["revision"]
            recipe = resolve(recipe, Began(name, commit, commit))
            source = loram_base.full_source(recipe)
        place = loram_base.Place(recipe, source, None, Path(artifact))
        return self._pruned(place, Path(artifact))

    def _pruned(self, place: loram_base.Place, directory: Path) -> Pruned:
        manifest = read_manifest(directory)
        options = type(self.base.pruning)(
            **{**manifest.options, "layer_ratios": _tuple(manifest.options["layer_ratios"])}
        )
        recipe = loram_base.with_artifact(place.recipe, directory)
        return Pruned(plan_pruning(place.source.config(), options), directory, manifest, place.source, recipe)

    def _trained(self, recipe: Recipe, pruned: str | None, *, fresh: bool = False) -> dict[str, Any]:
        """The outcome of a run, which is trained unless that very work is recorded as done."""
        ready = self.prepared(recipe)
        values = recipe.to_dict()
        sections = [values[name] for name in ("data", "train", "optimizer", "activations", "storage")]
        key = digest([identity_of(recipe, ready.train_data), pruned, sections])
        run_storage = self.storage.child(recipe.name)
        found = _record(run_storage, "train")
        if found.get("key") == key and not fresh and (Path(found["outcome"]["artifact"]) / FACTS).is_file():
            self.status(f"trained before: {found['outcome']['artifact']}")
            return dict(found["outcome"])
        finished = launch(recipe, fresh=fresh, listeners=self.listeners, status=self.status, ready=ready)
        outcome = finished.outcome.to_dict()
        run_storage.write_json("loram/train.json", {"key": key, "outcome": outcome})
        return outcome

    def _adapter(self) -> Path:
        adapter = Path(self.run_storage.join("adapter"))
        if not (adapter / FACTS).is_file():
            raise ModelError(f"{adapter}: run {self.recipe.name!r} has no result yet; run: raymem loram train RECIPE")
        return adapter

    def _recovered(self) -> Path:
        recovered = Path(self.run_storage.join("recovered"))
        if not (recovered / FACTS).is_file():
            raise ModelError(f"{recovered}: nothing is recovered yet; run: raymem loram recover RECIPE")
        return recovered

    def _progress(self, done: int, total: int) -> None:
        if done == total or done % max(1, total // 10) == 0:
            self.status(f"pruning: step {done}/{total}")


def _record(run_storage: Storage, stage: str) -> dict[str, Any]:
    name = f"loram/{stage}.json"
    return run_storage.read_json(name) if run_storage.exists(name) else {}


def _tuple(values: Any) -> Any:
    return None if values is None else tuple(values)


def _sha256(adapter: Path) -> str:
    return hashlib.sha256((adapter / WEIGHTS).read_bytes()).hexdigest()
