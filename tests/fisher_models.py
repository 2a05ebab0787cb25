"""Models whose Fisher information the tests measure, each with a batch: small, and awkward on purpose."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.utils.prune
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F


class Case(NamedTuple):
    model: nn.Module
    batch: tuple[Tensor, Tensor]  # inputs, targets
    slow: tuple[str, ...] = ()  # parameters that have no fast rule here


CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    CASES[build.__name__] = build
    return build


def vectors(n: int = 5, width: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randn(n, width), torch.randint(0, 4, (n,))


def images(n: int = 5, channels: int = 3, size: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(n, channels, size, size), torch.randint(0, 4, (n,))


def tokens(n: int = 4, length: int = 7, vocabulary: int = 11) -> tuple[Tensor, Tensor]:
    return torch.randint(0, vocabulary, (n, length)), torch.randint(0, 4, (n,))


@case
def mlp() -> Case:
    model = nn.Sequential(
        nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 6, bias=False), nn.ReLU(inplace=True), nn.Linear(6, 4)
    )
    return Case(model, vectors())


@case
def convolutions() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding="same", dilation=2, groups=3),
        nn.Conv2d(6, 6, (3, 1), padding=(1, 0), padding_mode="circular", groups=6),
        nn.Conv2d(6, 4, 1),
        nn.Flatten(),
        nn.Linear(64, 4),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return Case(model, images())


@case
def channels_last() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(180, 4))
    x, y = images()
    return Case(model.to(memory_format=torch.channels_last), (x.to(memory_format=torch.channels_last), y))


@case
def norms_of_vectors_and_volumes() -> Case:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vectors, self.volumes, self.layer = nn.BatchNorm1d(12), nn.BatchNorm3d(3), nn.LayerNorm((3, 4))
            self.head = nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.vectors(x).view(-1, 3, 2, 2, 1)
            x = self.volumes(x).view(-1, 3, 4)
            return self.head(self.layer(x).flatten(1))

    return Case(Model(), (torch.randn(6, 12), torch.randint(0, 4, (6,))))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, *, tied: bool, padding_idx: int | None = None) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 8, padding_idx=padding_idx), nn.Embedding(7, 8)
        self.blocks, self.norm = nn.ModuleList(Block(8, 2) for _ in range(2)), nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[:, -1]


@case
def transformer() -> Case:
    return Case(Transformer(tied=False), tokens())


@case
def tied_transformer() -> Case:
    return Case(Transformer(tied=True, padding_idx=3), tokens())


@case
def module_used_twice() -> Case:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.shared, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, ids: Tensor) -> Tensor:
            x = torch.tanh(self.shared(self.embed(ids)) + self.embed(ids.flip(1)))
            return self.head(torch.tanh(self.shared(x)).mean(1))

    return Case(Model(), tokens())


@case
def flattened_positions() -> Case:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, ids: Tensor) -> Tensor:
            B, T = ids.shape
            x = self.embed(ids).reshape(B * T, 6)
            return self.head(torch.relu(self.inner(x)).view(B, T, 6).sum(1))

    return Case(Model(), tokens())


@case
def positions_first() -> Case:
    class Model(nn.Module):  # [T, B, H] inside: the leading axis is not the batch
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.inner, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids).transpose(0, 1)
            return self.head(torch.tanh(self.inner(x)).sum(0))

    return Case(Model(), tokens())


@case
def weight_used_outside_its_module() -> Case:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(9, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(x))) + F.linear(x, self.inner.weight)

    return Case(Model(), vectors())


@case
def raw_parameters_and_recurrence() -> Case:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gate = nn.Embedding(11, 6), nn.Parameter(torch.randn(6))
            self.recurrent, self.head = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.recurrent(self.embed(ids) * self.gate)[0][:, -1])

    slow = tuple(f"recurrent.{kind}_{part}_l0" for kind in ("weight", "bias") for part in ("ih", "hh"))
    return Case(Model(), tokens(), slow)


@case
def attention_module() -> Case:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layer = nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.layer(self.embed(ids)).mean(1))

    return Case(Model(), tokens())


@case
def subclass_that_overrides_forward() -> Case:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    return Case(nn.Sequential(Scaled(9, 6), nn.Tanh(), nn.Linear(6, 4)), vectors())


@case
def further_parameters() -> Case:
    class Gained(nn.Linear):
        def __init__(self) -> None:
            super().__init__(9, 6)
            self.gain = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.gain

    model = nn.Sequential(Gained(), nn.Tanh(), nn.utils.prune.l1_unstructured(nn.Linear(6, 6), "weight", 0.5))
    model.append(nn.Linear(6, 4))
    return Case(model, vectors())


@case
def checkpointed() -> Case:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Sequential(nn.Linear(9, 6), nn.Tanh()), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False))

    return Case(Model(), vectors())
