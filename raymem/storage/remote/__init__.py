"""Files of models that lie on an object store or the Hugging Face hub: read in place, or copied to this node."""
