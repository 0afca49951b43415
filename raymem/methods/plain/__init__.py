"""Holds the plain choice of every axis: a whole base, full training, everything kept, the full loss, AdamW."""
