"""A model of Llama's shape in plain torch: RMSNorm, rotary positions, grouped attention, SwiGLU, tied embeddings.

Computes what transformers' LlamaForCausalLM does with the same weights. RMSNorm is written by hand, as it is there, and
not torch's module: that is the form which users' models have.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

ROTARY_BASE = 500_000.0  # Llama 3's


class RMSNorm(nn.Module):
    """In at least float32, rounded to the input's dtype before the weight."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:  # [..., H] -> [..., H]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """Causal; several heads share a key and a value."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.size = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * self.size, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, T, H], [T, size] twice -> [B, T, H]
        q, k, v = (
            project(x).unflatten(-1, (-1, self.size)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (t * cos + _half_turned(t) * sin for t in (q, k))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(attended.transpose(1, 2).flatten(2))


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


class SwiGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [..., H] -> [..., H]
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, kv_heads)
        self.mlp = SwiGLU(width, inner)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, T, H] -> [B, T, H]
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Parameters have transformers' names, less `model.`, and order."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, kv_heads: int, inner: int) -> None:
        super().__init__()
        self.size = width // heads
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, inner) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        nn.init.normal_(self.embed_tokens.weight, std=width**-0.5)  # logits of order 1

    def hidden(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, H]
        """What the lm_head takes."""
        x = self.embed_tokens(ids)
        cos, sin = (t.to(x.dtype) for t in self._rotation(ids))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, V]
        return self.lm_head(self.hidden(ids))

    def _rotation(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # [T, size] in float32: cosine and sine of every angle
        powers = torch.arange(0, self.size, 2, device=ids.device, dtype=torch.float32) / self.size
        angles = torch.outer(torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32), ROTARY_BASE**-powers)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()
