"""A CIFAR-style ResNet-18 for small images: 3x3 stem, four stages of two basic blocks, BatchNorm."""

from torch import Tensor, nn

# For digits. The last stage keeps its resolution: an 8x8 digit would otherwise reach it as a single pixel, where eight
# of the nine taps of every 3x3 kernel only ever see padding, never receive a gradient, and so could never be dampened.
STRIDES = (1, 2, 2, 1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            projection = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        out = self.bn1(self.conv1(x)).relu()
        out = self.bn2(self.conv2(out))
        return (out + self.shortcut(x)).relu()


class ResNet18(nn.Module):
    """Logits [B, classes] of images [B, channels, H, W]; `width` is the number of channels of the first stage."""

    def __init__(
        self, width: int = 64, classes: int = 10, channels: int = 1, strides: tuple[int, ...] = STRIDES
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        channels = width
        for depth, stride in enumerate(strides):
            out = width << depth
            stages.append(nn.Sequential(BasicBlock(channels, out, stride), BasicBlock(out, out, 1)))
            channels = out
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:  # [B, channels, H, W] -> [B, classes]
        features = self.stages(self.bn(self.stem(x)).relu())
        return self.head(features.mean((2, 3)))
