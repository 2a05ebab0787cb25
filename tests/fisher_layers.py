"""More models for `fisher_models.CASES`: one kind of layer, or of wiring, each."""

import torch
import torch.utils.checkpoint
from fisher_models import Case, case, images, tokens, vectors
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from unlearn_fast.fisher import Outer, Scaled, Use, rule_for


class Wiring(nn.Module):
    """A model made of modules or parameters, and of a forward that is a plain function of (model, x)."""

    def __init__(self, forward, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.wired = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.wired(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


@case
def convolutions_of_1_and_3_axes() -> Case:
    model = nn.Sequential(
        nn.Conv1d(3, 6, 4, padding="same"),  # one more on the right
        nn.Tanh(),
        nn.Conv1d(6, 4, 3, stride=2, dilation=2, groups=2, padding=1, padding_mode="reflect"),
        nn.Unflatten(2, (2, 2, 2)),
        nn.Conv3d(4, 6, (2, 1, 2), padding=(1, 0, 1), bias=False),
        nn.Conv3d(6, 4, 1, groups=2),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    x = torch.randn(5, 3, 18)
    model(x)
    return Case(model, (x, torch.randint(0, 4, (5,))))


@case
def transposed_convolutions() -> Case:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 6, 2, stride=1, groups=2, dilation=3, output_padding=2, bias=False),
        nn.Flatten(2),
        nn.ConvTranspose1d(6, 2, 4, stride=3),
        nn.Unflatten(2, (1, 1, -1)),
        nn.ConvTranspose3d(2, 2, (2, 1, 2), stride=(1, 2, 1)),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    x, y = images(size=5)
    model(x)
    return Case(model, (x, y))


@case
def norms() -> Case:
    model = nn.Sequential(
        nn.GroupNorm(2, 4), nn.PReLU(4), nn.InstanceNorm2d(4, affine=True), nn.Conv2d(4, 4, 3), nn.PReLU(),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.Tanh(), nn.Flatten(2), nn.RMSNorm(9), nn.Tanh(),
        nn.LayerNorm((4, 9), bias=False), nn.Tanh(), nn.InstanceNorm1d(4, affine=True), nn.Tanh(), nn.Flatten(),
        nn.GroupNorm(3, 36), nn.Linear(36, 4),
    )  # fmt: skip
    for module in model:
        if isinstance(module, (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    model[5].running_mean.normal_()
    return Case(model, images(channels=4, size=5))


@case
def images_folded_into_the_batch() -> Case:
    """[B, 3 frames, ...] through layers that see [B * 3, ...]."""

    def forward(m: Wiring, x: Tensor) -> Tensor:
        frames = m.conv(x.reshape(-1, 2, 6, 6))
        frames = m.group(m.batch(frames).relu())
        return m.head(frames.flatten(1)).view(len(x), 3, 4).sum(1)

    parts = {"conv": nn.Conv2d(2, 4, 3), "batch": nn.BatchNorm2d(4), "group": nn.GroupNorm(2, 4)}
    return Case(Wiring(forward, head=nn.Linear(64, 4), **parts), images(channels=6, size=6))


@case
def vision_transformer() -> Case:
    """Class token, position embedding and layer scale: parameters that no module owns alone."""

    def forward(m: Wiring, x: Tensor) -> Tensor:
        x = m.patches(x).flatten(2).mT
        x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions
        x = x + m.scale * m.mlp(m.norm(x))
        x = torch.cat([m.registers.repeat(len(x), 1, 1), x], 1)
        return m.head(m.norm(x)[:, 2])

    return Case(
        Wiring(
            forward, patches=nn.Conv2d(3, 8, 4, 4), token=parameter(1, 1, 8), positions=parameter(1, 5, 8),
            scale=parameter(8), mlp=nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)),
            registers=parameter(2, 8), norm=nn.LayerNorm(8), head=nn.Linear(8, 4),
        ),
        images(),
    )  # fmt: skip


@case
def attention_of_every_kind() -> Case:
    """Positions first, other sizes for keys and values, extra keys, and one whose first input needs no gradient."""

    def forward(m: Wiring, x: Tensor) -> Tensor:
        x = x.view(len(x), 3, 8)
        x = m.encoder(x)
        x = m.first(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1)
        memory = m.reduce(x)
        x, weights = m.cross(query=x, key=memory, value=memory)
        return m.head(x.sum(1)) + weights.sum((1, 2)).unsqueeze(1)

    return Case(
        Wiring(
            forward, encoder=nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
            first=nn.MultiheadAttention(8, 2, add_bias_kv=True), reduce=nn.Linear(8, 6, bias=False),
            cross=nn.MultiheadAttention(8, 4, kdim=6, vdim=6, bias=False, batch_first=True), head=nn.Linear(8, 4),
        ),
        vectors(width=24),
    )  # fmt: skip


@case
def products_of_every_kind() -> Case:
    def forward(m: Wiring, x: Tensor) -> Tensor:
        x = x.view(len(x), 3, 3)
        x = torch.addmm(m.bias, x.reshape(-1, 3), m.conv1d, beta=0.5, alpha=2).view(len(x), 3, 5)
        x = torch.tanh(x @ m.right)
        x = torch.tanh(m.left @ x)
        return F.linear(x.flatten(1), (1.0 + m.head.float()).to(x.dtype))

    return Case(
        Wiring(
            forward, bias=parameter(5), conv1d=parameter(3, 5), right=parameter(5, 6), left=parameter(2, 3),
            head=parameter(4, 12),
        ),
        vectors(),
    )  # fmt: skip


@case
def hand_made_norm_and_low_rank() -> Case:
    """An RMSNorm by structure, and a frozen linear layer with a low-rank part beside it."""

    def forward(m: Wiring, x: Tensor) -> Tensor:
        x = m.gain * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))
        x = m.base(x) + m.up(m.down(x)) * 0.5
        return m.head(torch.tanh(x * (1.0 + m.shift)))

    base = nn.Linear(9, 6).requires_grad_(False)
    low = {"down": nn.Linear(9, 2, bias=False), "up": nn.Linear(2, 6, bias=False)}
    return Case(
        Wiring(forward, gain=parameter(9), base=base, shift=parameter(6), head=nn.Linear(6, 4), **low), vectors()
    )


@case
def parametrized_weights() -> Case:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(9, 8)),
        nn.Tanh(),
        parametrizations.spectral_norm(nn.Linear(8, 6)),
        nn.Tanh(),
        parametrizations.orthogonal(nn.Linear(6, 4), use_trivialization=False),
    )
    return Case(model, vectors())


@case
def one_weight_in_several_shapes() -> Case:
    """Tied encoder and decoder, which overlap, and the parts of a fused weight, which do not."""

    def forward(m: Wiring, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(torch.tanh(F.linear(x, m.tied)), m.tied.t()))
        first, second = m.fused.split(4, dim=0)
        x = torch.tanh(F.linear(x, first) * F.linear(x, second))
        left, right = m.columns.chunk(2, dim=1)
        return F.linear(x[:, :2], left) + F.linear(x[:, 2:], right)

    return Case(Wiring(forward, tied=parameter(5, 9), fused=parameter(8, 9), columns=parameter(4, 4)), vectors())


@case
def positions_of_every_kind() -> Case:
    """Looked up without a batch axis, cut, resized, and as relative positions inside attention."""

    def forward(m: Wiring, ids: Tensor) -> Tensor:
        T = ids.shape[1]
        x = m.embed(ids) + m.table(torch.arange(T))[None] + m.cut[:, :T]
        x = x + F.interpolate(m.resized, size=T, mode="linear").mT
        distance = torch.arange(T)[None] - torch.arange(T)[:, None]
        bias = m.relative(distance.abs()).permute(2, 0, 1)[None]
        heads = x.view(len(ids), T, 2, 3).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias)
        return m.head((heads @ heads.mT + bias).softmax(-1) @ mixed).sum((1, 2))

    return Case(
        Wiring(
            forward, embed=nn.Embedding(11, 6, padding_idx=2), table=nn.Embedding(9, 6), cut=parameter(1, 9, 6),
            resized=parameter(1, 6, 4), relative=nn.Embedding(7, 2), head=nn.Linear(3, 4),
        ),
        tokens(),
    )  # fmt: skip


@case
def tokens_chosen_by_a_mask() -> Case:
    """Selected rows do not keep their place in the batch: nothing after them may be taken for granted."""

    def forward(m: Wiring, ids: Tensor) -> Tensor:
        x = m.embed(ids)
        mask = ids > 4
        out = torch.zeros(*ids.shape, 6, dtype=x.dtype)
        out[mask] = m.chosen(x[mask])
        return m.head(out.sum(1))

    parts = {"embed": nn.Embedding(11, 6), "chosen": nn.Linear(6, 6), "head": nn.Linear(6, 4)}
    return Case(Wiring(forward, **parts), tokens(), slow=("chosen.weight", "chosen.bias"))


@case
def changed_in_place_afterwards() -> Case:
    def forward(m: Wiring, x: Tensor) -> Tensor:
        x = m.first(x)
        x += m.bias
        x = m.second(x.relu_())
        x *= m.gain
        x.add_(m.shift).tanh_()
        return m.head(x)

    return Case(
        Wiring(
            forward, first=nn.Linear(9, 8), bias=parameter(8), second=nn.Linear(8, 6), gain=parameter(6),
            shift=parameter(1, 6), head=nn.Linear(6, 4),
        ),
        vectors(),
    )  # fmt: skip


@case
def long_short_term_memory() -> Case:
    def forward(m: Wiring, ids: Tensor) -> Tensor:
        return m.head(m.recurrent(m.embed(ids))[0][:, -1])

    parts = {"embed": nn.Embedding(11, 6), "recurrent": nn.LSTM(6, 5, batch_first=True), "head": nn.Linear(5, 4)}
    slow = tuple(f"recurrent.{kind}_{part}_l0" for kind in ("weight", "bias") for part in ("ih", "hh"))
    return Case(Wiring(forward, **parts), tokens(), slow)


@case
def recurrent_cell_in_a_loop() -> Case:
    def forward(m: Wiring, ids: Tensor) -> Tensor:
        state = m.start.expand(len(ids), -1)
        for x in m.embed(ids).unbind(1):
            state = torch.tanh(m.step(state) + x)
        return m.head(state)

    parts = {"embed": nn.Embedding(11, 6), "step": nn.Linear(6, 6), "head": nn.Linear(6, 4)}
    return Case(Wiring(forward, start=parameter(6), **parts), tokens())


@case
def checkpointed_blocks() -> Case:
    def forward(m: Wiring, x: Tensor) -> Tensor:
        for block in m.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return m.head(x)

    blocks = nn.Sequential(
        *(nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.LayerNorm(9), nn.Linear(9, 9)) for _ in range(3))
    )
    return Case(Wiring(forward, blocks=blocks, head=nn.Linear(9, 4)), vectors())


class DoubledProduct(torch.autograd.Function):
    """Stands for a kernel that torch functions do not show."""

    @staticmethod
    def forward(ctx, x, weight, gain):
        ctx.save_for_backward(x, weight, gain)
        return 2 * (x @ weight.T) * gain

    @staticmethod
    def backward(ctx, grad):
        x, weight, gain = ctx.saved_tensors
        grad = 2 * grad
        summed = (grad * (x @ weight.T)).sum(0)
        return (grad * gain) @ weight, (grad * gain).T @ x, summed


class Doubled(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.gain = parameter(outputs, inputs), parameter(outputs)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, str]:
        return DoubledProduct.apply(x * scale, self.weight, self.gain), "a tuple"


class DoubledWithRule(Doubled):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, str]:
        return super().forward(x, scale=scale)


@rule_for(DoubledWithRule)
def doubled(module: DoubledWithRule, x: Tensor, *, scale: float = 1.0) -> dict[str, Use]:
    def of_weight(grad: Tensor, x: Tensor) -> Outer:  # [n, O], [n, I]
        return Outer((scale * x).unsqueeze(1), (2 * grad * module.gain).unsqueeze(1))

    def of_gain(grad: Tensor, x: Tensor) -> Scaled:
        return Scaled((2 * scale * x @ module.weight.T).unsqueeze(1), grad.unsqueeze(1), module.gain.shape)

    return {"weight": Use((x,), of_weight), "gain": Use((x,), of_gain)}


@case
def kernels_that_torch_does_not_show() -> Case:
    def forward(m: Wiring, x: Tensor) -> Tensor:
        return m.head(torch.tanh(m.hidden(torch.tanh(m.ruled(x, scale=0.5)[0]))[0]))

    parts = {"ruled": DoubledWithRule(9, 7), "hidden": Doubled(7, 6), "head": nn.Linear(6, 4)}
    return Case(Wiring(forward, **parts), vectors(), slow=("hidden.weight", "hidden.gain"))
