"""Imported once by the server that forks the processes of tests: whatever a run imports or builds sooner or later."""

from __future__ import annotations

import importlib

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

for name in ("support", "peft", "pandas", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"):
    importlib.import_module(name)
get_checkpoint_conversion_mapping("llama")  # compiles a thousand patterns
