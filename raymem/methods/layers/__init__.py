"""Layers of transformers by what they compute: shared by methods that replace their forward passes."""
