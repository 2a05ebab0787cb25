"""The Fisher benchmark: the exact diagonal of whole models, in units of one ordinary forward and backward."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import unlearn_fast
from unlearn_fast.benchmarking import fisher_rivals, models
from unlearn_fast.benchmarking.case import (
    Case,
    Cost,
    Entrant,
    Inputs,
    Results,
    Run,
    Verdict,
    in_float64,
    integers,
    make_inputs,
    normal,
    release,
)
from unlearn_fast.benchmarking.fisher_rivals import Losses
from unlearn_fast.benchmarking.gpt import GPT, next_token_losses
from unlearn_fast.benchmarking.llama import Llama

# Of a parameter's importance, in norm: rounding is below it, and every mistake seen is far above.
TOLERANCE = 1e-5
# Where rounding moves the input of a ReLU across zero, the gradient jumps, in every implementation. So many times the
# error of torch's own float32 gradients of the same batches is allowed, where that is more than the tolerance: 2, since
# squares double a relative error, times 2, since each implementation rounds in its own way. Ours must then keep the
# tolerance on the float64 model.
MARGIN = 4.0
FIRST = "ours, with the first batch's check"
BASELINE = "ordinary forward, backward"
LOOP = "one-example loop"
LIBRARIES = ("BackPACK", "opacus")


@dataclass(frozen=True)
class Model:
    """What is measured, as it is described, built and fed."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], Any]
    losses: Losses
    chunk: int  # examples that torch.func takes at once: the fastest power of 2 on the machine of the record


def _images(size: int, classes: int, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(generator, B, 3, size, size), integers(generator, classes, B)


def _vectors(size: int, classes: int, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return normal(generator, B, size), integers(generator, classes, B)


def _mlp(*widths: int, chunk: int = 1) -> Model:
    name = f"MLP {'-'.join(map(str, widths))}"
    batch = partial(_vectors, widths[0], widths[-1])
    return Model(name, partial(models.mlp, *widths), batch, unlearn_fast.classification_losses, chunk)


def _vit(image: int, patch: int, width: int, layers: int, heads: int, classes: int = 10, chunk: int = 1) -> Model:
    name = f"ViT {image}x{image}, patch {patch}, d {width}, {layers} layers"
    build = partial(models.ViT, image, patch, width, layers, heads, classes)
    return Model(name, build, partial(_images, image, classes), unlearn_fast.classification_losses, chunk)


def resnet18(width: int, image: int) -> Model:
    name = f"ResNet-18 {image}x{image}" + (f", width {width}" if width != 64 else "")
    build = partial(models.resnet18, width, image)
    return Model(name, build, partial(_images, image, 10), unlearn_fast.classification_losses, 1)


def _gpt(vocabulary: int, width: int, layers: int, T: int, chunk: int = 1) -> Model:
    name = f"GPT d {width}, {layers} layers, V {vocabulary}, T {T}"
    build = partial(GPT, vocabulary, width, layers, max(1, width // 64), T)
    return Model(name, build, lambda B, g: integers(g, vocabulary, B, T), next_token_losses, chunk)


def llama(vocabulary: int, width: int, layers: int, heads: int, kv_heads: int, inner: int, T: int) -> Model:
    """Random tokens: of a loss on them, and of its gradients, every number costs what it costs on text."""
    name = f"Llama d {width}, {layers} layers, V {vocabulary}, T {T}"
    build = partial(Llama, vocabulary, width, layers, heads, kv_heads, inner)
    return Model(name, build, lambda B, g: integers(g, vocabulary, B, T), next_token_losses, chunk=2)


LLAMA_1B = partial(llama, 128_256, 2048, 16, 32, 8, 8192)  # of T: the shape of Llama 3.2 1B, 1,235,814,400 parameters
SMALLEST = (
    _mlp(12, 16, 16, 4),
    _vit(8, 4, 16, 1, 2),
    _gpt(50, 16, 1, 8),
    resnet18(4, 8),
    llama(50, 16, 1, 4, 2, 24, T=8),
)
MLP = _mlp(784, 1024, 1024, 10, chunk=4)
VIT_32 = _vit(32, 4, 192, 6, 3, chunk=4)
VIT_224 = _vit(224, 16, 192, 12, 3, classes=1000, chunk=4)  # ViT-Ti/16
VIT_B = _vit(224, 16, 768, 12, 12, classes=1000, chunk=16)  # ViT-B/16
GPT_512 = _gpt(8192, 512, 6, 128, chunk=4)
LLAMA_256 = llama(8192, 256, 2, 4, 2, 1024, T=128)
RESNET_18 = resnet18(64, 32)


def smallest() -> list[Case]:
    return [case(model, B=3, batches=2) for model in SMALLEST]


def full() -> list[Case]:
    return [
        case(MLP, B=256, batches=8),
        case(VIT_32, B=16, batches=8),
        case(VIT_224, B=8, batches=4),
        case(GPT_512, B=8, batches=2),
        case(LLAMA_256, B=8, batches=2),
        case(RESNET_18, B=32, batches=4),
    ]


def on_gpu() -> list[Case]:
    """ViTs without the loop over single examples, which takes minutes there. Small 16-bit batches wait for the host.

    Estimated for an H200: the 1B model takes half a minute. Of it, float64 is 1e14 operations and a few seconds; some
    60 runs of 0.05 to 0.3 s follow. Its float64 model, gradients and importances, 10 GB each, make a peak of 75 GB.
    """
    kinds = ((128, torch.bfloat16), (32, torch.float32), (32, torch.bfloat16))
    vits = [case(VIT_B, B=B, batches=2, dtype=dtype, device="cuda") for B, dtype in kinds]
    return [
        case(LLAMA_1B(T=512), B=4, batches=2, dtype=torch.bfloat16, device="cuda"),
        *(replace(c, rivals={n: run for n, run in c.rivals.items() if n != LOOP}) for c in vits),
    ]


@dataclass(frozen=True, kw_only=True)
class FisherCase(Case):
    """A model and some batches. Ours is timed with its one-time check of the first batch, and without."""

    model: Model
    B: int
    batches: int

    def entrants(self) -> list[Entrant]:
        K = self.batches
        further = Entrant("ours, each further batch", "ours", _twice(self.ours), self.exact, units=K, less=FIRST)
        others = [
            e._replace(units=K, kind="library" if e.name.startswith(LIBRARIES) else e.kind)
            for e in super().entrants()[1:]
        ]
        return [Entrant(FIRST, "ours", self.ours, self.exact, units=K), further, *others]

    def weighed(self) -> tuple[Case, ...]:
        """Two batches show the peak; with twice the examples they show what it depends on."""
        return tuple(
            case(self.model, B=B, batches=2, dtype=self.dtype, device=self.device) for B in (self.B, 2 * self.B)
        )

    def warm_up(self, inputs: Inputs) -> Inputs:
        return {**inputs, "batches": [next(fisher_rivals.split(inputs["batches"][0], 2))]}

    def counted(self) -> Cost:
        return self.cost._replace(flops=ordinary_flops(self.model, self.B))

    def facts(self) -> dict[str, Any]:
        parameters = sum(p.numel() for p in on_meta(self.model).parameters())
        return {
            "tolerance": self.tolerance(),
            "batch_size": self.B,
            "batches": self.batches,
            "parameters": parameters,
            "importance_bytes": 4 * parameters,
            "weighed_batch_sizes": [self.B, 2 * self.B],
        }

    def tolerance(self) -> float:
        """From torch's own error: that of its ordinary gradients on the same batches."""
        return max(TOLERANCE, MARGIN * _torch_error(self.model, self.B, self.batches, self.dtype, self.device))

    def verdict(self, entrant: Entrant, results: Results, exact: Results) -> Verdict:
        """Every parameter's importance must be right; another library may give those of some parameters only."""
        model = on_meta(self.model)
        sizes = [p.numel() for p in model.parameters()]
        if len(results) != len(sizes):
            return Verdict(float("inf"), f"gives {len(results)} results for {len(sizes)} parameters")
        errors = [None if r is None else _relative_error(r, e) for r, e in zip(results, exact, strict=True)]
        missing = [i for i, error in enumerate(errors) if error is None]
        wrong = [i for i, error in enumerate(errors) if error is not None and not error <= self.tolerance()]
        missing_share, wrong_share = (sum(sizes[i] for i in chosen) / sum(sizes) for chosen in (missing, wrong))
        failure = ""
        if wrong:
            failure = f"wrong in {wrong_share:.1%} of the parameters: {_listed(model, wrong)}"
        elif missing and (entrant.kind != "library" or len(missing) == len(sizes)):
            failure = "incomplete"
        note = f"without {_listed(model, missing)}" if missing else ""
        if entrant.name == FIRST and self.tolerance() > TOLERANCE and not failure:
            release()
            exactly = _largest(in_float64(self.ours)(make_inputs(self)), exact)
            note = f"{exactly:.0e} in float64"
            note += ", where no ReLU is rounded across zero" if self.dtype == torch.float32 else ""
            failure = "" if exactly <= TOLERANCE else "wrong in float64"
        worst = max((error for error in errors if error is not None), default=float("inf"))
        return Verdict(worst, failure, missing_share, note)


def case(model: Model, *, B: int, batches: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> FisherCase:
    vmap = partial(fisher_rivals.vmap_fisher, chunk=model.chunk)
    return FisherCase(
        model=model,
        B=B,
        batches=batches,
        operator="diagonal_fisher",
        shape=f"{model.name}; {batches} batches of {B}",
        dtype=dtype,
        device=device,
        with_host=True,
        inputs=partial(_inputs, model, B, batches, dtype),
        ours=_run(_ours, model.losses),
        exact=in_float64(_run(fisher_rivals.one_example_fisher, model.losses)),
        rivals={
            LOOP: _run(fisher_rivals.one_example_fisher, model.losses),
            f"torch.func vmap(grad), {model.chunk} at once": _run(vmap, model.losses),
            "BackPACK SumGradSquared": _run(fisher_rivals.backpack_fisher, model.losses),
            "opacus, squared": _run(fisher_rivals.opacus_fisher, model.losses),
        },
        yardsticks={
            "released form (another quantity)": _run(fisher_rivals.released_fisher, model.losses),
            BASELINE: _run(fisher_rivals.ordinary_gradients, model.losses),
        },
        baseline=BASELINE,
        cost=Cost("matrix products of one ordinary forward and backward"),
    )


def _inputs(model: Model, B: int, batches: int, dtype: torch.dtype, generator: torch.Generator) -> Inputs:
    return {"model": built(model, dtype, generator), "batches": drawn(model, B, batches, dtype, generator)}


def built(model: Model, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    """On the generator's device, and by its random numbers: a CPU's would take half a minute for 1e9 parameters."""
    device = generator.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(generator.initial_seed())
        return model.build().to(device, dtype)


def drawn(model: Model, B: int, batches: int, dtype: torch.dtype, generator: torch.Generator) -> list[Any]:
    """So many batches of B examples, images in the model's dtype."""

    def batch() -> Any:
        made = model.batch(B, generator)
        return tuple(x.to(dtype) if x.is_floating_point() else x for x in made) if isinstance(made, tuple) else made

    return [batch() for _ in range(batches)]


def _run(function: Callable[..., Results], losses: Losses) -> Run:
    return lambda x: function(x["model"], x["batches"], losses)


def _ours(model: nn.Module, batches: list[Any], losses: Losses) -> Results:
    return tuple(unlearn_fast.diagonal_fisher(model, batches, losses, progress=False).values())


def _twice(run: Run) -> Run:
    """The batches one more time: the mean stays what it is."""
    return lambda x: run({**x, "batches": x["batches"] * 2})


@cache
def _torch_error(model: Model, B: int, batches: int, dtype: torch.dtype, device: str) -> float:
    run = _run(fisher_rivals.ordinary_gradients, model.losses)
    inputs = make_inputs(case(model, B=B, batches=batches, dtype=dtype, device=device))
    return _largest(run(inputs), in_float64(run)(inputs))


def _largest(results: Results, exact: Results) -> float:
    return max(_relative_error(r, e) for r, e in zip(results, exact, strict=True) if r is not None)


@cache
def on_meta(model: Model) -> nn.Module:
    """The model without memory."""
    with torch.device("meta"):
        return model.build()


@cache
def ordinary_flops(model: Model, B: int) -> int:
    """Of the matrix products of one ordinary forward and backward of B examples."""
    batch = model.batch(B, torch.Generator())
    batch = batch.to("meta") if isinstance(batch, Tensor) else tuple(tensor.to("meta") for tensor in batch)
    with FlopCounterMode(display=False) as counter:
        fisher_rivals.ordinary_gradients(on_meta(model), [batch], model.losses)
    return counter.get_total_flops()


def _listed(model: nn.Module, chosen: list[int]) -> str:
    """Names of parameters, or in short the type of their module where all parameters of such modules are chosen."""
    names = [name for name, _ in model.named_parameters()]
    short = [f"{type(model.get_submodule(n.rpartition('.')[0])).__name__}.{n.rpartition('.')[2]}" for n in names]
    rest = {short[i] for i in range(len(names)) if i not in chosen}
    return ", ".join(dict.fromkeys(names[i] if short[i] in rest else short[i] for i in chosen))


def _relative_error(result: Tensor, exact: Tensor | None) -> float:
    """In norm, which no single tiny element decides."""
    if exact is None or result.shape != exact.shape:
        return float("inf")
    difference, size = float((result.detach().double() - exact).norm()), float(exact.norm())
    return difference / size if size else (0.0 if difference == 0 else float("inf"))
