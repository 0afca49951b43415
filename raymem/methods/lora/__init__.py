"""LoRA (Hu et al. 2021), as PEFT has it."""
