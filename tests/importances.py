"""Parameters and their importances: of any dtype, with any bits in the parameter, and about a third to be selected."""

import math
from collections.abc import Sequence

import torch
from accuracy import bits
from hypothesis import strategies as st
from layouts import DTYPES, LAYOUTS, lay_out
from torch import Tensor, nn

ALPHA = 2.0
HOSTILE = (0.0, -0.0, math.nan, math.inf, 1e-42, -1.0)
SIZES = (0, 1, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 65535, 65536, 65537, 131072, 131073)

Triple = list[Tensor]  # p, f, r

shapes = st.lists(st.sampled_from((0, 1, 2, 3, 5, 17)), max_size=4).map(tuple)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from((*LAYOUTS, "expanded"))


def any_bits(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Every NaN payload, both zeros, infinities and subnormal numbers may occur."""
    count = math.prod(shape) * (torch.finfo(dtype).bits // 8)
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(tuple(shape))


def triple(
    shape: int | Sequence[int],
    dtypes: Sequence[torch.dtype] = (torch.float32,) * 3,
    seed: int = 0,
    layouts: Sequence[str] = ("contiguous",) * 3,
    hostile: bool = True,
) -> Triple:
    """p, f and r. Values of f and r are hostile here and there, and negative ones are among them."""
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    generator = torch.Generator().manual_seed(seed)
    r = torch.rand(shape, generator=generator) + 0.1
    f = r * 3 * torch.rand(shape, generator=generator)
    if hostile:
        for values in (f, r):
            places = torch.randint(0, 40, shape, generator=generator)
            for place, value in enumerate(HOSTILE):
                values.masked_fill_(places == place, value)
    tensors = [any_bits(shape, dtypes[0], generator), f.to(dtypes[1]), r.to(dtypes[2])]
    return [_placed(x, layout) for x, layout in zip(tensors, layouts, strict=True)]


def _placed(x: Tensor, layout: str) -> Tensor:
    if layout == "expanded":  # of importances only: every row is the first
        return x[:1].expand(x.shape) if x.dim() and len(x) else x
    return lay_out(x, layout)


@st.composite
def triples(draw: st.DrawFn, most: int = 4) -> list[Triple]:
    """A list of parameters in which dtypes, shapes and layouts mix."""
    return [
        triple(
            draw(shapes),
            draw(st.tuples(dtypes, dtypes, dtypes)),
            draw(st.integers(0, 1000)),
            (draw(st.sampled_from(LAYOUTS)), draw(layouts), draw(layouts)),
        )
        for _ in range(draw(st.integers(0, most)))
    ]


def selects_all(*params: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Importances that quarter everything, where alpha is below 4."""
    return [torch.full(p.shape, 4.0) for p in params], [torch.ones(p.shape) for p in params]


def columns(rows: list[Triple]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, and the importances to both sets."""
    p, f, r = ([row[side] for row in rows] for side in range(3))
    return p, f, r


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """All bits."""
    return len(a) == len(b) and all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def many_tensors(most: int = 300) -> list[Triple]:
    """Several hundred, most of them tiny, of mixed dtypes; a few are large, and some empty."""
    return [
        triple((k * 37) % 41 if k % 97 else 70_000 + k, [DTYPES[(k // 4**i) % 4] for i in range(3)], seed=k)
        for k in range(most)
    ]


def mixed_model() -> nn.Module:
    """With tied weights, and of two dtypes."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"embedding": nn.Embedding(40, 30), "norm": nn.LayerNorm(30), "head": nn.Linear(30, 40)})
    model["head"].weight = model["embedding"].weight
    model["narrow"] = nn.Linear(30, 7).bfloat16()
    return model


def of_model(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Importances of its parameters, ratios from 0 to 4."""
    generator = torch.Generator().manual_seed(1)
    r = {name: torch.rand(p.shape, generator=generator) + 0.1 for name, p in model.named_parameters()}
    f = {name: 4 * t * torch.rand(t.shape, generator=generator) for name, t in r.items()}
    return f, r
