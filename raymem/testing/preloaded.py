"""Imported once by the server that forks the processes of tests: whatever a run imports sooner or later."""

from __future__ import annotations

import gc
import importlib

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from raymem.methods.peft.importing import without_bitsandbytes

gc.disable()  # what is imported stays
with without_bitsandbytes():
    importlib.import_module("peft")
for name in ("raymem.testing.suite", "pandas", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"):
    importlib.import_module(name)
get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns
gc.enable()
gc.freeze()
