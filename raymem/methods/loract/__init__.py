"""LoRAct: online low-rank compression of activations. README.md beside this file is the map."""

from raymem.methods.loract.compression import Compression, compress_activations
from raymem.methods.loract.config import LoRActOptions

__all__ = ["Compression", "LoRActOptions", "compress_activations"]
