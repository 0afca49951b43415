"""Lists the benchmarks: one claim each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """A script that compares side by side in one run, and writes ``<name>.json``."""

    name: str
    claim: str
    takes: str
    """On 2 cores, or on one GPU."""
    arguments: tuple[str, ...] = ()
    suites: tuple[str, ...] = ("cpu",)
    needs_gsm8k: bool = False
    module: str | None = None

    @property
    def script(self) -> str:
        """The file beside this one."""
        return f"{self.module or self.name}.py"


BENCHMARKS = (
    Benchmark(
        "methods",
        "memory and speed of every method and of its peers (PEFT's adapters, 8-bit AdamW, GaLore, APOLLO) on "
        "SmolLM2-135M: peaks, predicted and measured, and step time over LoRA in turns (resumable)",
        "2 h, with one idle core",
    ),
    Benchmark(
        "quality",
        "loss of held-out answers, exact match and loss of other text after the same steps of GSM8K on SmolLM2-135M: "
        "every method and its peers, learning rates tuned alike (rows that are there are not run again)",
        "10 min a row on one core, 17 lines of four rows",
        needs_gsm8k=True,
    ),
    Benchmark(
        "loram_smollm2",
        "loss of held-out answers of GSM8K on SmolLM2-135M under LoRAM: pruned, with its adapter, recovered, in wrong "
        "units (negative control), over ratios, criteria, refit and alignment, against LoRA on the full model and on "
        "one cut down to equal bytes (rows that are there are not run again)",
        "10 min a row on one core, 31 rows",
        needs_gsm8k=True,
    ),
    Benchmark(
        "budgets",
        "the best of all methods together in 300, 500 and 800 MiB on SmolLM2-135M, against the best of LoRA with "
        "checkpointing: sweeps with as many trials each, their best trained anew (resumable)",
        "2 h",
        needs_gsm8k=True,
    ),
    Benchmark(
        "choosing",
        "predicted memory of popular models under methods from exact to most frugal, and the first that fits each GPU "
        "(resumable)",
        "20 min",
    ),
    Benchmark(
        "ray_overhead",
        "what one Ray worker costs against the same step in a bare loop, taking turns: nothing measurable "
        "(0.96) with a core left for Ray's own processes; 0 to 10 % where training takes both cores, "
        "differing from hour to hour on a shared machine",
        "16 min",
    ),
    Benchmark(
        "slow_bucket",
        "training with a checkpoint every 20 steps on a bucket of 200 ms a request and 20 MB/s, in turns with training "
        "without any and with the local disk: what it costs in CPU time, and for how long training stands still, which "
        "is what the local copy takes",
        "10 min on an idle machine",
    ),
    Benchmark(
        "loract_memory",
        "bytes that LoRAct keeps and the peak of the step, against LoRA and checkpointing, at 4 and 16 layers"
        " and at 8192 tokens",
        "15 min",
    ),
    Benchmark(
        "loract_time",
        "step time of LoRAct against checkpointing, at most 1.05; the decomposition's share",
        "20 min (`--rounds 12`: 8)",
    ),
    Benchmark(
        "loract_gradients",
        "cosine with the exact gradient in every layer while `demo-long` trains, and with the best factors of"
        " the same rank; with a plot",
        "10 min for `--steps 100`",
    ),
    Benchmark(
        "loract_quality",
        "eval loss of training `demo-long` with LoRAct against exact training, 3 seeds, and a negative "
        "control (resumable)",
        "3 h",
    ),
    Benchmark(
        "loram_prune",
        "LoRAM's pruning from shard to shard: worker memory above its baseline under 3 layers (random, "
        "magnitude), magnitude at least half as fast as a plain copy of 4.9 GB",
        "20 min, 10 GB of disk",
    ),
    Benchmark(
        "scheduler",
        "the scheduler of pruning's and data's tasks on Ray: steps/s and the driver's memory over thousands of steps "
        "that do nothing",
        "5 min",
    ),
    Benchmark(
        "scaling",
        "bytes, tasks and memory of LoRAM's stages for models of 70B to 480B by their shapes, and their time on 1, 8 "
        "and 64 nodes that share a bucket, computed from the rates that others of these measured",
        "20 min",
    ),
    Benchmark(
        "loram_quality",
        "eval loss of pruned and full model without and with the recovered adapter, over ratios and criteria,"
        " against LoRA on the full model, on a dense model of equal bytes, and wrong units (negative "
        "control); peak bytes (resumable)",
        "4 h",
    ),
    Benchmark(
        "mlorc_step",
        "an MLorc step against the paper's algorithm as lean as torch says it, and against fused AdamW; its "
        "share of a training step",
        "5 min",
    ),
    Benchmark(
        "mlorc_quality",
        "pre-training loss after equal steps: MLorc, the paper's algorithm, AdamW, the negative control rank 1",
        "40 min",
    ),
    Benchmark(
        "moram_linear",
        "time and peak of one linear layer under MoRAM's two formulations, LoRA, SHiRA and a dense mask, over"
        " the frozen layer",
        "10 min",
    ),
    Benchmark(
        "moram_step",
        "a whole training step of the demo model: MoRAM at most 1.25 of LoRA",
        "2 min",
    ),
    Benchmark(
        "moram_selection",
        "recall of the connections that N batches choose, and the footprint of choosing",
        "15 min",
    ),
    Benchmark(
        "moram_quality",
        "MoRAM against LoRA, SHiRA and random connections at equal trainable state, learning rates tuned alike",
        "4 h",
    ),
    Benchmark(
        "sweep_quality",
        "30-trial joint sweeps of the demo model under a budget that half of the space exceeds, 3 seeds: none"
        " starts above it, predictions within 3 %, best loss against a random search that knows no budget "
        "(resumable)",
        "40 min",
    ),
    Benchmark(
        "loss_time",
        "step time of the loss in chunks over the whole logits on the shape of SmolLM2-135M: LoRA with half "
        "of the positions targets at most 0.93, with all 1.00, full fine-tuning 1.03",
        "15 min",
    ),
    Benchmark(
        "encode_time",
        "tokens per CPU second of raymem's encoding (ids and targets) over `datasets.map(batched=True)` with "
        "the same tokenizer, at least 0.8 on text and on chats of three turns; seconds of one conversation of"
        " 50 to 400 turns",
        "5 min",
    ),
    Benchmark(
        "planner_smollm2",
        "predicted against measured peak of `raymem train` with SmolLM2-135M on GSM8K: 4 methods, 2 micro-"
        "batches, 2 row lengths, 3 packings",
        "an hour on an idle machine",
        needs_gsm8k=True,
    ),
    Benchmark(
        "planner_accuracy",
        "predicted against measured peak of a step for every method and three families; with `--gpu` on this "
        "machine's GPU",
        "20 min",
        suites=("cpu", "gpu"),
    ),
    Benchmark(
        "parity",
        "losses and weights of every method on 1, 2 and 4 workers, by DDP and FSDP2, with chunked loss and "
        "checkpointing, against one process with the full loss: within 1e-5 and 1e-3, and all ranks hold the "
        "same bits; writes docs/numerics.md",
        "3 min",
    ),
    Benchmark(
        "peak_terms",
        "what the predicted peak of four fine-tunings of Llama-3.1 consists of (8B with NF4, LoRAct and "
        "LoRAM, and 70B), with logits held whole and in chunks; with a plot; needs no network",
        "2 min",
    ),
    Benchmark(
        "prepare_memory",
        "resident memory of the processes that prepare a large file of JSON lines: at most 600 MB, most of it"
        " the libraries, whatever the size (results: 2 GB, `--workers 2`, 417 MB in a worker)",
        "15 min on a loaded machine and 8 GB of disk for 2 GB",
    ),
    Benchmark(
        "merge_time",
        "`raymem merge` of 5 GB in bf16 against copying its files: at most twice the time, and a rise of resident "
        "memory of at most 700 MB",
        "5 min and 20 GB of disk",
    ),
    Benchmark(
        "thread_wait",
        "step time by how idle threads wait, on quiet cores and beside a busy process: as set by the command "
        "line within 3 % of spinning and, beside a busy process, as sleeping",
        "20 min on an idle machine",
    ),
)
