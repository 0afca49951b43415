"""The memory methods, one folder each; pure torch, usable without Ray, MLflow or a recipe."""
