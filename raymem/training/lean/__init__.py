"""Replaces stock layers by ones with the same values and fewer bytes.

Nothing is kept for backward that follows from what is kept anyway, and no sum is made beside its parts.

What stock layers hold or allocate too much, for T tokens, hidden size N and inner size I of a gated MLP:

- RMSNorm and LayerNorm keep an fp32 copy of their input [T, N]; here the input itself.
- A gated MLP keeps gate, up, ``silu(gate)`` and the product [T, I]; here the first two.
- LoRA makes its addend twice (before and after scaling) and the sum a third time [T, I]; here one product adds into the
  output of the frozen layer, and in backward into the gradient. It keeps one bit per number of its dropout's mask
  instead of the mask in the dtype of the input and what came out.
- A large 4-bit weight is dequantised whole (and in fp32 if its checkpoint was); here block by block.

The forward pass is that of the stock layer but for the rounding of LoRA's sum, the backward pass rounds less often.
"""

from raymem.training.lean.install import install

__all__ = ["install"]
