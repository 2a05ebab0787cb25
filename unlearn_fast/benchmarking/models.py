"""The models of the Fisher benchmark, besides the GPT: random, but with activations and gradients of ordinary size."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from unlearn_fast.benchmarking.gpt import Block
from unlearn_fast.demo.resnet import ResNet18


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths, with ReLU between them."""
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class ViT(nn.Module):
    """A vision transformer as most are written: class token and position embedding are parameters of its own."""

    def __init__(self, image: int, patch: int, width: int, layers: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.5)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False, layer_scale=0.1) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, classes]
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def resnet18(width: int, image: int) -> nn.Module:
    """The usual ResNet-18 for small colour images, in eval mode, its running statistics those of random images."""
    model = ResNet18(width, channels=3, strides=(1, 2, 2, 2))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # the running statistics become those of one batch
    with torch.no_grad():
        model.train()(torch.randn(64, 3, image, image))
    return model.eval()
