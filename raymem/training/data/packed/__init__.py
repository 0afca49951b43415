"""Packs examples into rows on disk, and reads them back in the order of training."""
