"""A stream of real gradients: a small transformer learns Python source, byte by byte, with exact AdamW."""

from __future__ import annotations

import functools
import inspect
import json.decoder
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, LENGTH, ROWS = 128, 64, 8


class ByteModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, bytes_BS: torch.Tensor) -> torch.Tensor:
        mask_SS = nn.Transformer.generate_square_subsequent_mask(bytes_BS.shape[1])
        return self.head(self.layers(self.embedding(bytes_BS), mask=mask_SS, is_causal=True))


@functools.cache
def gradient_stream(steps: int = 30, seed: int = 0) -> Sequence[dict[str, torch.Tensor]]:
    """Gradients of every matrix of the model, step by step."""
    torch.manual_seed(seed)
    model = ByteModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.tensor(list(inspect.getsource(json.decoder).encode()), dtype=torch.long)
    stream = []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - LENGTH - 1, (ROWS,))
        rows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        matrices = {n: p.grad.clone() for n, p in model.named_parameters() if p.ndim == 2 and p.grad is not None}
        stream.append(matrices)
        optimizer.step()
    return stream
