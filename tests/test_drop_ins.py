"""selective_log_softmax and cross_entropy have the contracts of the functions that they stand in for."""

import itertools
import math

import pytest
import torch
from accuracy import assert_as_accurate
from layouts import DTYPES
from torch import Tensor
from torch.nn import functional

from unlearn_fast import cross_entropy, selective_log_softmax

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pytestmark = pytest.mark.usefixtures("poisoned_memory")

TARGETS = {"[N, C]": (7, 11), "[C]": (11,), "[N, C, d1]": (3, 11, 5), "[N, C, d1, d2]": (2, 11, 3, 4), "one": (3, 1)}


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which about a fifth is ignored."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * 2).to(dtype)
    C, leading = (shape[0], ()) if len(shape) == 1 else (shape[1], (shape[0], *shape[2:]))
    target = torch.randint(C, leading, generator=generator)
    if target.dim():
        target[torch.rand(leading, generator=generator) < 0.2] = -100
    return logits, target


# selective_log_softmax


@every_dtype
@pytest.mark.parametrize("shape", [(4,), (), (2, 3), (4, 1), (4, 3), (2, 3, 5), (4, 0)], ids=str)
@pytest.mark.parametrize("V", [1, 9, 1025])
def test_selective_log_softmax(dtype, shape, V):
    """index [...] and [..., K], as TRL's function takes them."""
    for leading in {shape, shape[:-1]}:
        logits = torch.randn(*leading, V).to(dtype)
        index = torch.randint(V, shape)

        def run(library, inputs: list[Tensor]) -> list[Tensor]:
            z = inputs[0].detach().requires_grad_()
            value = library.selective_log_softmax(z, inputs[1])
            return [value.detach(), torch.autograd.grad(value.sum(), z)[0]]

        def scales(inputs: list[Tensor], shape=shape, V=V) -> list[Tensor]:
            size = torch.tensor(10.0 + math.log(V), dtype=torch.float64)
            rows = (1 + (shape[-1] if shape else 0)) * torch.ones_like(inputs[0])
            return [size.expand(shape), rows]

        assert selective_log_softmax(logits, index).dtype == dtype
        assert selective_log_softmax(logits, index).shape == shape
        assert_as_accurate(run, [logits, index], dtype, scales=scales)


def test_selective_log_softmax_has_no_ignored_index():
    with pytest.raises(RuntimeError, match="labels holds -100"):
        selective_log_softmax(torch.zeros(3, 4), torch.tensor([0, -100, 1]))
    with pytest.raises(ValueError, match=r"labels has shape \[2\] and logits \[3, 4\]"):
        selective_log_softmax(torch.zeros(3, 4), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"index\[..., 0\] has shape \[2\]"):
        selective_log_softmax(torch.zeros(3, 4), torch.zeros(2, 5, dtype=torch.int64))


# cross_entropy


@every_dtype
@pytest.mark.parametrize("shape", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy(dtype, shape, label_smoothing):
    logits, target = make_inputs(shape, dtype)
    for reduction in ("mean", "sum", "none"):

        def run(library, inputs: list[Tensor], reduction=reduction) -> list[Tensor]:
            z = inputs[0].detach().requires_grad_()
            options = {"reduction": reduction, "label_smoothing": label_smoothing}
            loss = library.cross_entropy(z, inputs[1], **options)
            return [loss.detach(), torch.autograd.grad(loss.sum(), z)[0]]

        def scales(inputs: list[Tensor], reduction=reduction) -> list[Tensor]:
            loss = functional.cross_entropy(inputs[0], inputs[1], reduction=reduction)
            return [loss.abs() + 4, torch.ones_like(inputs[0])]

        ours = cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)
        theirs = functional.cross_entropy(logits, target, reduction=reduction, label_smoothing=label_smoothing)
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert_as_accurate(run, [logits, target], dtype, scales=scales)


@pytest.mark.parametrize(("reduction", "smoothing"), list(itertools.product(("mean", "sum", "none"), (0.0, 0.3))))
def test_cross_entropy_where_every_target_is_ignored(reduction, smoothing):
    logits, target = torch.full((3, 4), math.nan), torch.full((3,), 2)
    options = {"ignore_index": 2, "reduction": reduction, "label_smoothing": smoothing}
    theirs = functional.cross_entropy(torch.zeros(3, 4), target, **options)
    torch.testing.assert_close(cross_entropy(logits, target, **options), theirs, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_of_masked_classes(smoothing):
    logits, target = torch.randn(3, 4), torch.tensor([0, 1, 2])
    logits[:, 3] = -math.inf
    theirs = functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    ours = cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3).long(), {"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        (torch.zeros(3, 4), torch.zeros(3).long(), {"label_smoothing": 1.5}, ValueError, "label_smoothing is 1.5"),
        (torch.zeros(3, 4), torch.zeros(3, 4), {}, TypeError, "labels has dtype torch.float32"),
        (torch.zeros(3, 4), torch.zeros(4).long(), {}, ValueError, r"labels has shape \[4\]"),
        (torch.tensor(0.0), torch.tensor(0), {}, ValueError, r"logits has shape \[\]"),
        (torch.zeros(3, 4), torch.tensor([0, 4, 1]), {}, RuntimeError, "labels holds 4 at row 1"),
    ],
)
def test_cross_entropy_errors(logits, target, options, error, message):
    with pytest.raises(error, match=message):
        cross_entropy(logits, target, **options)


def test_compiled_as_one_graph():
    logits, target = make_inputs((7, 11), torch.float32)
    for function, index in ((cross_entropy, target), (selective_log_softmax, torch.randint(11, (7, 2)))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(logits, index), function(logits, index))
