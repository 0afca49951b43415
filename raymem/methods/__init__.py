"""The memory methods, one folder each; pure torch, usable without Ray, MLflow or a recipe."""

OPTIONS_RULES = {"extra": "forbid", "strict": True, "allow_inf_nan": False, "use_attribute_docstrings": True}
"""``__pydantic_config__`` of every option dataclass, so that the recipe reads it as strictly as its own sections."""
