"""What LoRAM's stages take of large models on 1, 8 and 64 nodes that share a bucket: computed from measured rates.

    python benchmarks/scheduler.py               # first: it measures how fast tasks are started
    python benchmarks/scaling.py --node-gbit 100 --bucket-gbit 800 --cores 64

Bytes, tasks and memory come from the models' shapes, by the code that prunes and plans. Times are bytes over rates. A
rate is measured (in another result of this directory) or given by the options that describe the cluster.
There is no measured rate of training such models, so that for training the work is given and no time.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import provenance

RATIO, RANK, TOKENS = 0.65, 16, 2048
MIXTURE = {
    "model_type": "qwen3_moe",
    "hidden_size": 6144,
    "intermediate_size": 8192,
    "moe_intermediate_size": 2560,
    "num_hidden_layers": 62,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 160,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
}
MODELS = ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-405B", "Qwen3-Coder-480B-A35B")
NODES = (1, 8, 64)


def config_of(model: str) -> Any:
    from transformers import AutoConfig

    from raymem.planner.shapes import shipped_models

    raw = MIXTURE if model == MODELS[-1] else shipped_models()[model]
    return AutoConfig.for_model(**{**raw, "dtype": "bfloat16"})


def source_of(config: Any, folder: Path) -> Any:
    """Return a model of which only the shapes are there, in bf16, as pruning opens it."""
    from raymem.methods.loram.nonuniform import meta_model
    from raymem.methods.loram.source import Source
    from raymem.storage.safetensors_io import Entry

    config.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}
    tensors = {
        name: Entry("model.safetensors", name, "BF16", shape, 0, 2 * _numel(shape)) for name, shape in shapes.items()
    }
    return Source(str(folder), "shape", None, tensors, {"shape": True}, str(folder))


def _numel(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def stages(model: str) -> dict[str, Any]:
    """Return what the stages read, write and hold."""
    import torch

    from raymem.cluster.step_jobs import LIBRARIES_BYTES
    from raymem.errors import RaymemError
    from raymem.methods.loram import PruneOptions
    from raymem.methods.loram.nonuniform import meta_model, with_counts
    from raymem.methods.loram.pruning.job import describe_job
    from raymem.methods.loram.pruning.steps import memory_bytes, steps

    config = config_of(model)
    with tempfile.TemporaryDirectory() as folder:
        source = source_of(config, Path(folder))
        sizes = {name: entry.num_bytes for name, entry in source.tensors.items()}
        full = sum(sizes.values())
        widest = max(2 * _numel(entry.shape[-2:]) for entry in source.tensors.values())  # experts are stored one by one
        found: dict[str, Any] = {"full_bytes": full, "stages": {}}
        adapter = 2 * _adapter_elements({name: entry.shape for name, entry in source.tensors.items()})
        found["stages"]["merge"] = {"tasks": 1, "read": full + adapter, "write": full, "peak": 2 * widest + adapter}
        try:
            for criterion in ("random", "taylor"):
                options = PruneOptions(criterion=criterion, ratio=RATIO)  # type: ignore[arg-type]
                ids = torch.zeros((10, 64), dtype=torch.long) if options.needs_calibration else None
                job = describe_job(source, Path(folder) / "out", options, ids)
                pruned = {
                    name: tuple(tensor.shape)
                    for name, tensor in meta_model(with_counts(config, job.counts)).state_dict().items()
                }
                todo = steps(job)
                passes = [step for step in todo if step.kind in ("embed", "forward", "loss", "backward")]
                written = 2 * sum(map(_numel, pruned.values()))
                found["stages"][f"prune, {criterion}"] = {
                    "tasks": len(todo),
                    "in_a_row": len(passes),
                    "source": full,
                    "read": full + sum(_weights(source, job, step) for step in passes),
                    "write": written,
                    "peak": max(memory_bytes(job, step) for step in todo) + LIBRARIES_BYTES,
                    "largest_task": max(sum(e.num_bytes for e in source.layer(job.coupling, 0).values()), widest),
                }
                found["pruned_bytes"] = written
        except RaymemError as error:
            found["refused"] = str(error)
            return found
    small = 2 * _adapter_elements(pruned)
    found["stages"]["recover"] = {"tasks": 1, "read": small, "write": adapter, "peak": small + adapter}
    found["pruned_parameters"] = found["pruned_bytes"] // 2
    return found


def _weights(source: Any, job: Any, step: Any) -> int:
    """Return the bytes of weights that a pass reads."""
    if step.kind in ("embed", "loss"):
        return sum(entry.num_bytes for entry in source.rest(job.coupling).values()) // 2
    return sum(entry.num_bytes for entry in source.layer(job.coupling, step.layer).values())


def _adapter_elements(shapes: dict[str, tuple[int, ...]]) -> int:
    """Return the elements of LoRA on every linear layer of the decoder."""
    linear = [shape for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name]
    return RANK * sum(rows + columns for rows, columns in linear)


def train_plan(model: str) -> dict[str, Any]:
    """Plan LoRA on the pruned model, or on the model itself where it cannot be pruned, on one worker."""
    from raymem.errors import RaymemError
    from raymem.planner import plan_recipe
    from raymem.recipe.load import recipe_of

    mixture = model == MODELS[-1]
    folder = tempfile.mkdtemp()
    config_of(model).save_pretrained(folder)
    raw = {
        "name": "scaling",
        "model": {"name": folder, "tokenizer": "demo"},
        "data": {"train": "demo:text", "sequence_length": TOKENS, "packing": "wrapped"},
        "base": {"quantize": "nf4"} if mixture else {"kind": "loram", "ratio": RATIO, "quantize": "nf4"},
        "adapter": {"kind": "lora", "rank": RANK},
        "activations": "checkpoint",
        "train": {"steps": 1, "global_batch": 8, "micro_batch": 1, "precision": "bf16"},
        "scaling": {"num_workers": 1, "use_gpu": True},
    }
    try:
        plan = plan_recipe(recipe_of(raw), gpu="H100-80GB", timeout_s=1200)
    except RaymemError as error:
        return {"refused": str(error)}
    finally:
        shutil.rmtree(folder)
    return {"capacity_bytes": plan.capacity_bytes, "terms": plan.terms}


def rates() -> dict[str, dict[str, Any]]:
    """Return the measured rates, with where they are from."""

    def of(name: str) -> Any:
        return json.loads((provenance.RESULTS / f"{name}.json").read_text())

    pruning, merging, scheduler = of("loram_prune"), of("merge_time"), of("scheduler")
    size = pruning["checkpoint_bytes"]
    seconds = sorted(entry["seconds"] for entry in merging["rounds"])
    return {
        "prune, random": {
            "bytes_per_core_s": size / pruning["criteria"]["random"]["seconds"],
            "from": "loram_prune.json",
        },
        "prune, taylor": {
            "bytes_per_core_s": size / pruning["criteria"]["taylor"]["seconds"],
            "from": "loram_prune.json, 10 texts of 64 tokens",
        },
        "merge": {
            "bytes_per_core_s": merging["file_bytes"] / seconds[len(seconds) // 2],
            "from": "merge_time.json",
        },
        "scheduler": {"steps_per_s": scheduler["rows"][-1]["steps_per_s"], "from": "scheduler.json"},
    }


def seconds_of(name: str, stage: dict[str, Any], nodes: int, asked: Any, measured: dict[str, Any]) -> float | None:
    """Return the computed wall time of a stage on a number of nodes; None where no rate is measured.

    The slowest of three decides: the network, the cores, the steps that follow one another; starting tasks is added.
    """
    if name not in measured:
        return None
    gbit = 1e9 / 8
    at_once = nodes if stage["tasks"] > 1 else 1
    network = (stage["read"] + stage["write"]) / (min(at_once * asked.node_gbit, asked.bucket_gbit) * gbit)
    rate = measured[name]["bytes_per_core_s"]
    if stage["tasks"] == 1:
        working = stage["read"] / rate
    else:  # layers are written side by side, and behind the passes, which follow one another
        writing = measured["prune, random"]["bytes_per_core_s"]
        passes = stage["source"] / rate - stage["source"] / writing
        working = passes + max(stage["source"] / (at_once * asked.cores), stage["largest_task"]) / writing
    return float(max(network, working) + stage["tasks"] / measured["scheduler"]["steps_per_s"])


def main() -> None:
    parser = provenance.parser(__doc__)
    parser.add_argument("--node-gbit", type=float, default=25.0, help="network of a node, Gbit/s; default: %(default)s")
    parser.add_argument("--bucket-gbit", type=float, default=400.0, help="of the bucket; default: %(default)s")
    parser.add_argument("--cores", type=int, default=32, help="of a node; default: %(default)s")
    asked = parser.parse_args()
    measured = rates()
    rows = []
    for model in MODELS:
        found = {
            **provenance.kept(f"scaling-{model}", lambda model=model: stages(model)),
            "train": provenance.kept(f"scaling-{model}-train", lambda model=model: train_plan(model)),
        }
        for name, stage in found["stages"].items():
            stage["seconds"] = {str(n): seconds_of(name, stage, n, asked, measured) for n in NODES}
        rows.append({"model": model, **found})
    cluster = {"node_gbit": asked.node_gbit, "bucket_gbit": asked.bucket_gbit, "cores": asked.cores}
    provenance.save("scaling", {"ratio": RATIO, "rank": RANK, "cluster": cluster, "rates": measured, "rows": rows})


if __name__ == "__main__":
    main()
