"""Uses models that one device cannot hold: how many workers share one, and what they do with it."""
