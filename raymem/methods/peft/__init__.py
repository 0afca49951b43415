"""Holds the common part of PEFT's adapters; LoRA and MoRAM build on it, and others may."""
