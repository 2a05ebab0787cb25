"""sum_grad_squared_embedding_'s Triton kernel, interpreted."""

import pytest
import torch
from interpreted import DTYPES, MOMENTS, assert_moments, randn, sums
from layouts import LAYOUTS, lay_out, surroundings
from torch import Tensor

from unlearn_fast.ops.sum_grad_squared_embedding.triton import sum_grad_squared_embedding_


def gradients(tokens: Tensor, g: Tensor, V: int) -> Tensor:
    hot = torch.nn.functional.one_hot(tokens.long().clamp(min=0), V).double() * (tokens >= 0).unsqueeze(-1)
    return torch.einsum("btv,bth->bvh", hot, g.double())


def check(tokens: Tensor, g: Tensor, V: int, weights=False, first=False, absolute=False, layout="contiguous") -> None:
    before = sums((V, g.shape[-1]), len(g), g.dtype, weights, first)
    out, w, mean = (None if x is None else lay_out(x, layout) for x in before)
    guards = [surroundings(x) for x in (out, mean) if x is not None]
    sum_grad_squared_embedding_(out, tokens, g, w, mean, 0.3, absolute)
    assert_moments(out, mean, before, gradients(tokens, g, V), gradients(tokens, g.abs(), V), absolute, 0.3)
    assert all(torch.equal(surroundings(x), y) for x, y in zip((out, mean), guards, strict=False) if x is not None)


def draw(B: int, T: int, V: int, seed: int = 0) -> Tensor:
    return torch.randint(-1, V, (B, T), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "T", "V", "H"), [(1, 1, 1, 1), (3, 7, 5, 33), (2, 40, 3, 70), (5, 1, 9, 600)])
@pytest.mark.parametrize(("weights", "first", "absolute"), MOMENTS)
def test_shapes(dtype, B, T, V, H, weights, first, absolute):
    check(draw(B, T, V), randn(B, T, H, dtype=dtype), V, weights, first, absolute)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    tokens, g = draw(3, 9, 6), randn(3, 9, 20, dtype=torch.float32)
    check(lay_out(tokens, layout), lay_out(g, layout), 6, True, True, layout=layout)
    check(tokens.int(), lay_out(g, layout), 6)


@pytest.mark.parametrize("tokens", [torch.zeros(3, 30).long(), torch.arange(30).view(3, 10), torch.full((3, 8), -5)])
def test_one_token_all_tokens_none(tokens):
    check(tokens, randn(*tokens.shape, 12, dtype=torch.float64), 30, True, True)


def test_rows_of_tokens_that_do_not_occur_are_untouched():
    out = torch.full((4, 3), torch.nan)
    out[2] = 0
    sum_grad_squared_embedding_(out, torch.full((2, 5), 2), torch.ones(2, 5, 3), None, None, 1.0, False)
    assert out[[0, 1, 3]].isnan().all() and torch.equal(out[2], torch.full((3,), 50.0))


def test_a_nan_stays_in_its_token_and_column():
    tokens, g = torch.tensor([[0, 1, 1, 2], [1, 1, 1, 1]]), torch.ones(2, 4, 3)
    g[0, 2, 1] = torch.nan
    out = torch.zeros(3, 3)
    sum_grad_squared_embedding_(out, tokens, g, None, None, 1.0, False)
    nan = torch.nan
    assert torch.equal(out.nan_to_num(-1), torch.tensor([[1.0, 1, 1], [20, nan, 20], [1, 1, 1]]).nan_to_num(-1))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_nothing_to_add(shape):
    out = torch.full((2, 3), torch.nan)
    sum_grad_squared_embedding_(out, torch.ones(shape).long(), torch.ones(*shape, 3), None, None, 1.0, False)
    assert out.isnan().all()


def test_a_token_beyond_the_table_is_an_error():
    out = torch.zeros(3, 2)
    with pytest.raises(RuntimeError):
        sum_grad_squared_embedding_(out, torch.tensor([[0, 3]]), torch.ones(1, 2, 2), None, None, 1.0, False)
    assert not out.any()
