"""raymem inside other people's trainers: Hugging Face Trainer and TRL, Lightning, axolotl.

Each trainer has a module of its own here, which imports it; :mod:`raymem.integrations.applied` holds what they share.
"""
