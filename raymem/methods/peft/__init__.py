"""What adapters of PEFT have in common; LoRA and MoRAM stand on it, and others may."""
