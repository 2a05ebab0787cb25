"""dampen_: the released formula bit for bit, the edge cases, every size and layout, and what it must not write."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy import bits
from hypothesis import given
from hypothesis import strategies as st
from layouts import DTYPES, LAYOUTS, lay_out, surroundings
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from unlearn_fast import dampen_, reference

INF, NAN = math.inf, math.nan
TINY = 2.0**-149  # the smallest float32
GOLDEN = Path(__file__).parent / "data" / "ssd_official.safetensors"

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def released(p: Tensor, f: Tensor, r: Tensor, *, alpha: float, lam=1.0, exponent=1.0, cap=1.0) -> Tensor:
    """The released code's operations in its order; `cap` is its `lower_bound`."""
    weight = power((r * lam) / f, exponent)
    chosen = torch.where(f > r * alpha)
    update = weight[chosen]
    update[torch.where(update > cap)] = cap
    p = p.clone()
    p[chosen] = p[chosen].mul(update)
    return p


def power(ratio: Tensor, exponent: float) -> Tensor:
    """`ratio ** exponent` in float32, rounded to nearest.

    Torch's own is that for 1, 2 and 3. For all others it depends on the build: with MKL, one square root in 150 is off
    by a bit, and powers by up to 40.
    """
    if exponent in (1, 2, 3):
        return ratio**exponent
    wide = ratio.double().numpy()
    with np.errstate(all="ignore"):
        return torch.from_numpy(np.sqrt(wide) if exponent == 0.5 else np.power(wide, exponent)).to(ratio.dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN is one value: which NaN a product gives is up to the processor."""
    nan = torch.tensor(NAN)
    return torch.equal(*(bits(torch.where(x.isnan(), nan.to(x.dtype), x)) for x in (a, b)))


def make_inputs(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters, and importances over many orders of magnitude, most of them far below 1e-8."""
    generator = torch.Generator().manual_seed(seed)
    p, f, r = torch.randn(3, n, generator=generator, dtype=torch.float64)
    return p.to(dtype), (6 * f - 20).exp().float(), (6 * r - 20).exp().float()


# The released formula

SETTINGS = [
    {"alpha": 10.0, "lam": 1.0},
    {"alpha": 1.0, "lam": 0.3},
    {"alpha": 0.1, "lam": 5.0},
    {"alpha": 0.1, "lam": 5.0, "cap": 0.7},
    {"alpha": 0.0, "lam": 1.0, "cap": INF},
    {"alpha": 2.0, "lam": 0.0},
    {"alpha": 1.7, "lam": 1.3, "exponent": 0.5},
    {"alpha": 1.7, "lam": 1.3, "exponent": 2.0},
    {"alpha": 0.5, "lam": 1.3, "exponent": 3.0, "cap": 2.0},
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(f"{k}={v}" for k, v in s.items()))


@every_setting
@pytest.mark.parametrize("n", [0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1023, 65536, 65537, 200_003])
def test_released_formula_bit_for_bit(n, settings):
    p, f, r = make_inputs(n)
    expected = released(p, f, r, **settings)
    dampen_([p], [f], [r], **settings)
    assert torch.equal(bits(p), bits(expected))


HOSTILE = (0.0, TINY, 1e-40, 1e-30, 0.5, 1.0, 3.0, 1e30, 3e38, INF, NAN)


@every_setting
def test_released_formula_with_hostile_values(settings):
    """Every combination; but the released code makes inf / inf of an infinite f, where lam * r overflows."""
    values = torch.tensor(HOSTILE)
    p, f, r = torch.cartesian_prod(torch.cat([values, -values]), values, values).T.contiguous()
    expected = released(p, f, r, **settings)
    infinite = f.isinf() & (f > r * settings["alpha"])
    expected[infinite] = p[infinite] * 0
    dampen_([p], [f], [r], **settings)
    assert same_bits(p, expected)


@every_setting
@pytest.mark.parametrize("run", ["batch1", "batch4"])
def test_released_parameters_from_released_importances(run, settings):
    """The authors' own output, bit for bit, with the settings of the file; any other setting must differ."""
    golden = load_file(GOLDEN)
    with safe_open(GOLDEN, "pt") as file:
        metadata = file.metadata()
    names = [name.removeprefix(f"{run}.forget.") for name in golden if name.startswith(f"{run}.forget.")]
    params = {name: golden[f"model.{name}"].clone() for name in names}
    forget, rest = ({name: golden[f"{run}.{side}.{name}"] for name in names} for side in ("forget", "reference"))
    published = {"alpha": float(metadata["alpha"]), "lam": float(metadata["lam"])}
    report = dampen_(params, forget, rest, **published)
    assert report.total.selected > 0 and len(names) == 12
    for name in names:
        assert torch.equal(bits(params[name]), bits(golden[f"{run}.dampened.{name}"]))
    others = {name: golden[f"model.{name}"].clone() for name in names}
    dampen_(others, forget, rest, **settings)
    assert any(not torch.equal(others[name], params[name]) for name in names)


@pytest.mark.parametrize("exponent", [0.25, 0.7, 1.5, 4.0, 7.3])
def test_other_exponents_are_rounded_once(exponent):
    p, f, r = make_inputs(5000)
    expected = released(p, f, r, alpha=0.5, exponent=exponent, cap=2.0)
    dampen_([p], [f], [r], alpha=0.5, exponent=exponent, cap=2.0)
    assert torch.equal(bits(p), bits(expected))


def test_square_roots_agree_with_torchs_to_a_bit():
    """The released code's own power, whose last bit depends on torch's build."""
    _, f, r = make_inputs(5000)
    p = torch.ones(5000)
    dampen_([p], [f], [r], alpha=1.0, exponent=0.5)
    chosen = f > r
    assert ((bits(p) - bits((r / f) ** 0.5)).abs()[chosen] <= 1).all() and (p[~chosen] == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_setting
def test_16_bit_parameters_are_computed_in_float32_and_rounded_once(dtype, settings):
    p, f, r = make_inputs(70_001, dtype)
    expected = torch.where(f > r * settings["alpha"], released(p.float(), f, r, **settings).to(dtype), p)
    dampen_([p], [f], [r], **settings)
    assert torch.equal(bits(p), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_every_16_bit_parameter(dtype):
    """All 65536 values, subnormal ones and NaN among them, times factors that put products on and beside ties."""
    p = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for factor in (1.0, 0.5, 0.75, 2.0**-9, 1 + 2.0**-8, 1 + 2.0**-10, 3.0, 1e-3, 65536.0):
        f, r = torch.ones(len(p)), torch.full((len(p),), 0.25)
        result = p.clone()
        dampen_([result], [f], [r], alpha=1.0, lam=4 * factor, cap=INF)
        assert same_bits(result, (p.float() * factor).to(dtype))


def test_float64_parameters_and_float64_importances():
    p, f, r = (x.double() for x in make_inputs(5000))
    f *= 1 + 1e-12  # not a float32
    expected = released(p, f, r, alpha=2.0)
    dampen_([p], [f], [r], alpha=2.0)
    assert torch.equal(bits(p), bits(expected))


def test_float64_importances_select_exactly():
    """f > alpha * r in float64, where float32 would see equality."""
    p, f, r = torch.ones(2), torch.tensor([2 + 1e-12, 2 - 1e-12], dtype=torch.float64), torch.ones(2)
    dampen_([p], [f], [r], alpha=2.0)
    assert p.tolist() == [0.5, 1.0]


# Edge cases: alpha 2, lam 1, cap 1

EDGES = [
    #  p      f         r         result  selected  non-finite importance  selected and p non-finite
    (3.0,    0.0,      0.0,      3.0,    0, 0, 0),
    (3.0,    0.0,      1.0,      3.0,    0, 0, 0),
    (3.0,    0.0,      INF,      3.0,    0, 1, 0),
    (3.0,    1.0,      0.0,      0.0,    1, 0, 0),
    (-3.0,   1.0,      0.0,      -0.0,   1, 0, 0),
    (3.0,    TINY,     0.0,      0.0,    1, 0, 0),
    (3.0,    4.0,      1.0,      0.75,   1, 0, 0),
    (3.0,    2.0,      1.0,      3.0,    0, 0, 0),  # strict
    (3.0,    1.0,      1.0,      3.0,    0, 0, 0),
    (3.0,    8 * TINY, TINY,     0.375,  1, 0, 0),  # subnormal importances count
    (3.0,    3e38,     TINY,     0.0,    1, 0, 0),  # the factor underflows
    (3.0,    INF,      1.0,      0.0,    1, 1, 0),
    (3.0,    INF,      0.0,      0.0,    1, 1, 0),
    (3.0,    INF,      1e38,     0.0,    1, 1, 0),
    (3.0,    INF,      INF,      3.0,    0, 1, 0),
    (3.0,    1.0,      INF,      3.0,    0, 1, 0),
    (3.0,    NAN,      1.0,      3.0,    0, 1, 0),
    (3.0,    1.0,      NAN,      3.0,    0, 1, 0),
    (3.0,    NAN,      NAN,      3.0,    0, 1, 0),
    (3.0,    NAN,      0.0,      3.0,    0, 1, 0),
    (3.0,    INF,      NAN,      3.0,    0, 1, 0),
    (0.0,    4.0,      1.0,      0.0,    1, 0, 0),
    (-0.0,   4.0,      1.0,      -0.0,   1, 0, 0),
    (TINY,   3.0,      1.0,      0.0,    1, 0, 0),
    (TINY,   1.0,      1.0,      TINY,   0, 0, 0),
    (INF,    4.0,      1.0,      INF,    1, 0, 1),
    (-INF,   4.0,      1.0,      -INF,   1, 0, 1),
    (INF,    1.0,      0.0,      NAN,    1, 0, 1),
    (NAN,    4.0,      1.0,      NAN,    1, 0, 1),
    (NAN,    0.0,      1.0,      NAN,    0, 0, 0),
    (INF,    1.0,      1.0,      INF,    0, 0, 0),
]  # fmt: skip


@pytest.mark.parametrize(("p", "f", "r", "result", "selected", "non_finite", "non_finite_selected"), EDGES)
@pytest.mark.parametrize("library", [dampen_, reference.dampen_], ids=["ours", "reference"])
def test_edge_case(library, p, f, r, result, selected, non_finite, non_finite_selected):
    param = torch.tensor([p])
    report = library([param], [torch.tensor([f])], [torch.tensor([r])], alpha=2.0)
    assert same_bits(param, torch.tensor([result]))
    counts = report.total
    assert counts[:4] == (1, selected, non_finite, non_finite_selected)


@pytest.mark.parametrize("position", [0, 5, 127, 128, 499])
def test_edge_cases_behave_so_anywhere_in_an_array(position):
    """Among ordinary neighbours, in any lane and block."""
    for p, f, r, result, *_ in EDGES:
        params, forget, rest = torch.ones(500), torch.full((500,), 4.0), torch.ones(500)
        params[position], forget[position], rest[position] = p, f, r
        dampen_([params], [forget], [rest], alpha=2.0)
        assert same_bits(params[position], torch.tensor(result))
        params[position] = 0.25
        assert (params == 0.25).all()


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"alpha": 2.0, "lam": 6.0}, 1.0),  # lam / 4 = 1.5, capped
        ({"alpha": 2.0, "lam": 6.0, "cap": 1.25}, 1.25),
        ({"alpha": 2.0, "lam": 6.0, "cap": INF}, 1.5),
        ({"alpha": 2.0, "lam": 1.0, "cap": 0.125}, 0.125),
        ({"alpha": 2.0, "lam": 1.0, "cap": 0.0}, 0.0),
        ({"alpha": 2.0, "lam": 0.0}, 0.0),
        ({"alpha": 0.0, "lam": 1.0}, 0.25),
        ({"alpha": 2.0, "lam": 1.0, "exponent": 2.0}, 0.0625),
        ({"alpha": 2.0, "lam": 1.0, "exponent": 0.5}, 0.5),
        ({"alpha": 2, "lam": 1, "exponent": 1, "cap": 1}, 0.25),
    ],
    ids=str,
)
def test_settings(settings, factor):
    p = torch.tensor([-8.0])
    report = dampen_([p], [torch.tensor([4.0])], [torch.tensor([1.0])], **settings)
    assert p.item() == -8 * factor
    assert report.total.mean_factor == factor


# Memory


@every_dtype
@given(
    shape=st.lists(st.sampled_from((0, 1, 2, 3, 5, 17)), max_size=4).map(tuple),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    importance_dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    seed=st.integers(0, 1000),
)
def test_any_shape_strides_and_dtypes(dtype, shape, layouts, importance_dtypes, seed):
    """Values as the reference has them on contiguous copies; only the parameter's own elements are written."""
    values = [x.view(shape) for x in make_inputs(math.prod(shape), dtype, seed)]
    values[1:] = [(x * 1e6).to(d) for x, d in zip(values[1:], importance_dtypes, strict=True)]
    places = [lay_out(x, layout) for x, layout in zip(values, layouts, strict=True)]
    guards = [surroundings(x) for x in places]
    expected = values[0].clone()
    wanted = reference.dampen_([expected], [values[1]], [values[2]], alpha=2.0)
    report = dampen_([places[0]], [places[1]], [places[2]], alpha=2.0)
    assert torch.equal(bits(places[0]), bits(expected))
    assert report.total[:4] == wanted.total[:4]
    assert all(torch.equal(bits(x), bits(value)) for x, value in zip(places[1:], values[1:], strict=True))
    assert all(torch.equal(surroundings(x), guard) for x, guard in zip(places, guards, strict=True))


def test_channels_last_parameters_and_ordinary_importances():
    p, f, r = (x.view(4, 3, 5, 2) for x in make_inputs(120))
    expected = released(p, f, r, alpha=1.0)
    p = p.to(memory_format=torch.channels_last)
    dampen_([p], [f], [r], alpha=1.0)
    assert torch.equal(p, expected) and p.is_contiguous(memory_format=torch.channels_last)


def test_autograd_notices_the_change():
    p = torch.ones(3)
    version = p._version
    x = torch.ones(3, requires_grad=True)
    loss = (x * p).sum()
    dampen_([p], [torch.ones(3)], [torch.zeros(3)], alpha=1.0)
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_leaves_that_require_grad_stay_leaves():
    p = torch.ones(3, requires_grad=True)
    dampen_([p], [torch.full((3,), 4.0)], [torch.ones(3)], alpha=1.0)
    assert p.is_leaf and p.grad_fn is None and p.tolist() == [0.25] * 3
    p.sum().backward()
    assert p.grad.tolist() == [1.0] * 3


def test_tensors_made_in_inference_mode():
    with torch.inference_mode():
        p = torch.ones(3)
    dampen_([p], [torch.full((3,), 4.0)], [torch.ones(3)], alpha=1.0)
    assert p.tolist() == [0.25] * 3


# Report, threads, torch.compile


def test_report():
    """Two parameters: factors 1/4 and 1/8 in the first, nothing in the second."""
    params = {"weight": torch.ones(2, 3), "bias": torch.ones(2), "empty": torch.ones(0)}
    forget = {"weight": torch.tensor([[4.0, 8.0, 1.0], [NAN, INF, 1.0]]), "bias": torch.ones(2), "empty": torch.ones(0)}
    rest = {"weight": torch.ones(2, 3), "bias": torch.tensor([1.0, INF]), "empty": torch.ones(0)}
    params["weight"][1, 1] = NAN
    report = dampen_(params, forget, rest, alpha=2.0)
    assert report.names == ("weight", "bias", "empty")
    weight, bias, empty = report.parameters.values()
    assert weight == (6, 3, 2, 1, pytest.approx((1 / 4 + 1 / 8 + 0) / 3)) and weight.share == 0.5
    assert bias[:4] == (2, 0, 1, 0) and math.isnan(bias.mean_factor) and bias.share == 0
    assert empty[:4] == (0, 0, 0, 0) and empty.share == 0
    assert report.total == (8, 3, 3, 1, pytest.approx((1 / 4 + 1 / 8) / 3))
    assert str(report) == "dampened 3 of 8 values (37.500%), mean factor 0.125; 3 importances were not finite"


def test_report_of_a_large_array():
    p, f, r = make_inputs(300_001)
    chosen = f > r * 3
    factor = ((r[chosen] * 2) / f[chosen]).clamp(max=1).double()
    counts = dampen_([p], [f], [r], alpha=3.0, lam=2.0).total
    assert counts[:4] == (300_001, int(chosen.sum()), 0, 0)
    assert counts.mean_factor == pytest.approx(factor.mean().item(), rel=1e-12)


def test_report_of_nothing():
    report = dampen_({}, {}, {}, alpha=1.0)
    assert report.total[:4] == (0, 0, 0, 0) and report.parameters == {}
    assert str(report) == "dampened 0 of 0 values (0.000%)"


def test_the_number_of_threads_does_not_change_a_bit():
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        p, f, r = make_inputs(500_003)
        results.append((p, dampen_([p], [f], [r], alpha=3.0).stats))
    torch.set_num_threads(threads)
    for p, stats in results[1:]:
        assert torch.equal(bits(p), bits(results[0][0])) and torch.equal(bits(stats), bits(results[0][1]))


@pytest.mark.parametrize("kind", ["list", "mapping", "module"])
def test_compiled_as_one_graph(kind):
    layer, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    forget = {n: torch.full_like(p, 4.0) for n, p in layer.named_parameters()}
    rest = {n: torch.ones_like(p) for n, p in layer.named_parameters()}

    def run(layer: torch.nn.Module) -> Tensor:
        params = {"module": layer, "mapping": dict(layer.named_parameters()), "list": list(layer.parameters())}[kind]
        f, r = (list(x.values()) if kind == "list" else x for x in (forget, rest))
        return dampen_(params, f, r, alpha=2.0).stats

    stats = torch.compile(run, fullgraph=True, backend="aot_eager")(layer)
    assert torch.equal(stats, run(twin))
    assert torch.equal(layer.weight, twin.weight) and torch.equal(layer.bias, twin.bias)
