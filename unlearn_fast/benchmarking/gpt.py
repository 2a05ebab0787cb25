"""A small pre-norm transformer with tied embeddings, in plain torch modules, for the Fisher benchmark."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention


class LayerScale(nn.Module):
    """A learned factor of each channel."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:  # [..., H] -> [..., H]
        return x * self.gamma


class Block(nn.Module):
    """Self-attention, then an MLP, each on normalised inputs, scaled if asked for, and added to the stream."""

    def __init__(self, width: int, heads: int, *, causal: bool = True, layer_scale: float | None = None) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        # Without a bias, as in most recent models: the loss does not depend on the bias of an attention key.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.scale1, self.scale2 = (
            nn.Identity() if layer_scale is None else LayerScale(width, layer_scale) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:  # [B, T, H] -> [B, T, H]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.scale1(self.attention_out(attended.transpose(1, 2).flatten(2)))
        return x + self.scale2(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, positions: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=width**-0.5)  # logits of order 1

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, V]
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


def next_token_losses(model: nn.Module, ids: Tensor) -> Tensor:  # [B, T] -> [B]
    """Mean cross entropy of each sequence's next tokens."""
    logits, targets = model(ids)[:, :-1], ids[:, 1:]
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)
