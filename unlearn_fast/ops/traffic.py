"""What the Triton kernels move and compute, counted in Triton's interpreter, beside floors: needs triton, but no GPU.

`python -m unlearn_fast.ops.traffic` prints a table, of which docs/kernels.md shows a part; `--json FILE` also writes
its rows. The launchers run on small CPU tensors, and every load, store, floating-point operation and exponential of
their kernels is counted as it is interpreted, padding included. So is every address: what is wanted again may come from
a cache, what is wanted once must move. Floors are formulas of a call's sizes, however large. What torch does beside the
kernels (a sort, a copy where a layout needs one, the magnitudes of T = 1) is not counted.
"""

import argparse
import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# -- floors ------------------------------------------------------------------------------------------------------------


class Floor(NamedTuple):
    """What a call can do no less of, as formulas of its sizes.

    FLOPs are those of matrix products, and of sums, differences, products and quotients of elements.
    """

    bytes: str
    flops: str
    exponentials: str = "0"


# e: bytes of an element, w: of an element of the results (4; 8 for float64); labels and tokens have 8.
# Rows: N, of which K are not ignored; V columns; c: exponentials a logit, 2 under a softcap; t: the teacher's e.
# Sums of squares: B examples, T positions, I inputs, O outputs; m moments (1, or 2 with `first`), q: 1 with weights.
# Convolutions: B W images of C channels and S pixels, of which a group has G, to P positions; a kernel of k taps.
# What meets nothing but padding counts as well.
# Embeddings: M tokens that are not negative, of which R are different, E within their examples; H columns.
SUMS = "(1 + m + m*q)"  # of an example's gradient: a square; for each moment a sum and, with weights, a product
FLOORS = {
    "token_logprobs": Floor("e*K*V + (8 + 3*w)*N", "2*K*V", "c*K*V"),
    "token_logprobs, statistics": Floor("e*K*V + (8 + 6*w)*N", "5*K*V", "c*K*V"),
    "token_logprobs_backward": Floor("e*(K + N)*V + 8*N + 4*w*K", "2*K*V", "c*K*V"),
    "token_logprobs_backward, statistics": Floor("e*(K + N)*V + 8*N + 8*w*K", "6*K*V", "c*K*V"),
    "token_logprobs_backward_": Floor("e*(K + N)*V + 8*N + 4*w*K", "2*K*V", "c*K*V"),
    "token_kl": Floor("(e + t)*K*V + (8 + 5*w)*N", "7*K*V", "2*c*K*V"),
    "token_kl_backward": Floor("(e + t)*K*V + e*N*V + 8*N + 5*w*K", "4*K*V", "2*c*K*V"),
    "token_kl_backward_": Floor("(e + t)*K*V + e*N*V + 8*N + 5*w*K", "4*K*V", "2*c*K*V"),
    "linear": Floor("e*B*T*(O + I) + 2*m*w*O*I + q*w*B", f"2*B*T*O*I + {SUMS}*B*O*I + 2*m*O*I"),
    "linear, T = 1": Floor("e*B*(O + I) + 2*m*w*O*I + q*w*B", "2*m*B*O*I + B*(O + I) + 2*m*O*I"),
    "conv": Floor("e*B*W*(C*S + O*P) + 2*m*w*O*G*k + q*w*B", f"2*B*W*P*O*G*k + {SUMS}*B*O*G*k + 2*m*O*G*k"),
    "embedding": Floor("e*M*H + 8*B*T + 2*m*w*R*H + q*w*B", f"M*H + {SUMS}*E*H + 2*m*R*H"),
    "scale": Floor("2*e*B*T*C + 2*m*w*C + q*w*B", f"2*B*T*C + {SUMS}*B*C + 2*m*C"),
    "scale, bias": Floor("e*B*T*C + 2*m*w*C + q*w*B", f"B*T*C + {SUMS}*B*C + 2*m*C"),
    "add_parts": Floor("w*(parts + 2)*n", "(parts + 1)*n"),
    "scale_": Floor("2*e*n + 4", "n"),
    "scale_ by 1": Floor("4", "0"),
}


class Work(NamedTuple):
    bytes: int
    flops: int
    exponentials: int


def at_least(operator: str, dtype: torch.dtype, **sizes: int) -> Work:
    """The floors of a call: `at_least("token_logprobs", torch.bfloat16, N=8192, K=8192, V=128256).bytes` is 2.1e9."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    numbers = {"e": dtype.itemsize, "w": wide, "t": dtype.itemsize, "c": 1, "m": 1, "q": 0, **sizes}
    return Work(*(eval(formula, {"__builtins__": {}}, numbers) for formula in FLOORS[operator]))


# -- counts ------------------------------------------------------------------------------------------------------------


class Accesses:
    """Loads, or stores: how many bytes, and where."""

    def __init__(self) -> None:
        self.bytes = 0
        self._places: dict[int, list[np.ndarray]] = {}  # bytes of an element -> addresses

    def add(self, pointers: Any, mask: Any) -> None:
        """Elements that the mask leaves out do not count."""
        size = pointers.get_element_ty().primitive_bitwidth // 8
        places = pointers.data[np.asarray(mask.data, dtype=bool)].astype(np.int64)
        self.bytes += size * len(places)
        self._places.setdefault(size, []).append(places)

    def distinct(self) -> int:
        """Bytes, each once, however often it was wanted."""
        every = [np.unique(np.concatenate(p))[:, None] + np.arange(size) for size, p in self._places.items()]
        return len(np.unique(np.concatenate([np.ravel(e) for e in every]))) if every else 0

    def of(self, x: Tensor) -> Tensor:
        """How often each element of a tensor was wanted, which must have lived throughout."""
        storage, size = x.untyped_storage(), x.element_size()
        places = np.concatenate([np.empty(0, np.int64), *self._places.get(size, [])]) - storage.data_ptr()
        inside = places[(places >= 0) & (places < storage.nbytes())] // size
        counts = torch.from_numpy(np.bincount(inside, minlength=storage.nbytes() // size))
        return counts.as_strided(x.shape, x.stride(), x.storage_offset())


@dataclass
class Traffic:
    """What kernels moved and computed, whatever of it was padding."""

    loads: Accesses = field(default_factory=Accesses)
    stores: Accesses = field(default_factory=Accesses)
    products: int = 0  # FLOPs of tl.dot: 2 M N K a call
    elementwise: int = 0  # FLOPs of sums, differences, products and quotients
    exponentials: int = 0

    @property
    def work(self) -> Work:
        return Work(self.loads.bytes + self.stores.bytes, self.products + self.elementwise, self.exponentials)

    @property
    def footprint(self) -> int:
        """Bytes that were loaded, and bytes that were stored, each once."""
        return self.loads.distinct() + self.stores.distinct()


@contextmanager
def counting() -> Iterator[Traffic]:
    """Counts what kernels do that are launched inside. TRITON_INTERPRET must have been set before triton's import."""
    from triton import knobs
    from triton.runtime.interpreter import InterpreterBuilder, ReduceOps

    if not knobs.runtime.interpret:
        raise RuntimeError("kernels that are compiled cannot be counted: set TRITON_INTERPRET=1 before triton's import")
    traffic = Traffic()

    def note(name: str, result: Any, first: Any, *others: Any) -> None:
        match name:
            case "create_masked_load":
                traffic.loads.add(first, others[0])
            case "create_masked_store":
                traffic.stores.add(first, others[1])
            case "create_dot":
                traffic.products += 2 * result.data.size * first.data.shape[-1]
            case "create_fma":
                traffic.elementwise += 2 * result.data.size
            case "create_exp" | "create_exp2":
                traffic.exponentials += result.data.size
            case "sum":
                traffic.elementwise += first.handle.data.size - result.handle.data.size
            case "create_atomic_rmw" | "create_atomic_cas":  # which no kernel uses
                raise NotImplementedError(f"{name} is not counted")
            case _:
                traffic.elementwise += result.data.size

    def hooked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            result = function(self, *arguments, **options)
            note(name, result, *arguments)
            return result

        return call

    def reduced(self: Any, values: Any) -> Any:
        """The interpreter would compare one pair of elements after another."""
        if getattr(self.combine_fn, "__name__", "") != "larger":
            raise NotImplementedError(f"a reduction by {self.combine_fn} is not counted")
        return self.min_max(values[0], val_reduce_op=np.max)

    # All other loads and stores, those by descriptors among them, end in the masked ones.
    names = ("masked_load", "masked_store", "dot", "fadd", "fsub", "fmul", "fdiv", "fma", "exp", "exp2", "atomic_rmw",
             "atomic_cas")  # fmt: skip
    places = [*((InterpreterBuilder, f"create_{name}") for name in names), (ReduceOps, "sum")]
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, function in before:
        setattr(owner, name, hooked(name, function))
    before.append((ReduceOps, "generic_reduce", ReduceOps.generic_reduce))
    ReduceOps.generic_reduce = reduced
    try:
        yield traffic
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


# -- cases -------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A small call whose launches are counted: enough to take every way through a kernel."""

    operator: str
    title: str
    dtype: torch.dtype
    sizes: dict[str, int]
    launch: Callable[[], Any]
    tensors: dict[str, Tensor]
    processors: int = 1  # of the GPU that is pretended: with more of them, fewer rows and tiles are split

    def floors(self) -> Work:
        return at_least(self.operator, self.dtype, **self.sizes)

    def run(self) -> tuple[Traffic, Any]:
        """What was counted, and what was returned."""
        from unlearn_fast.ops import _triton

        before, _triton.INTERPRETED_PROCESSORS = _triton.INTERPRETED_PROCESSORS, self.processors
        try:
            with np.errstate(all="ignore"), counting() as traffic:
                return traffic, self.launch()
        finally:
            _triton.INTERPRETED_PROCESSORS = before


def cases() -> Iterator[Case]:
    """Of every operator that has a Triton kernel."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    yield from rows("[8, 4096]", torch.zeros(8, 4096, dtype=bfloat16))
    yield from rows("[8, 2601]", torch.zeros(8, 2601, dtype=bfloat16), ignored=2)
    yield from rows("[8, 2601]", torch.zeros(8, 2601), ignored=2, softcap=30.0)
    yield from rows("[2, 3, 1101][:, :-1]", torch.zeros(2, 3, 1101, dtype=bfloat16)[:, :-1])
    yield from rows("[3, 2601] in parts", torch.zeros(3, 2601), ignored=1, processors=6)
    for everything in (False, True):
        yield linear("B 3, T 70, 130 -> 65", 3, 70, 130, 65, float32, everything=everything)
    yield linear("B 2, T 70, 136 -> 200, boxes", 2, 70, 136, 200, bfloat16, by_boxes=True)
    yield linear("B 9, T 40, 130 -> 65 in parts", 9, 40, 130, 65, bfloat16, processors=6)
    yield linear("B 77, 66 -> 9", 77, 1, 66, 9, float32)
    yield linear("B 77, 130 -> 65, in parts", 77, 1, 130, 65, bfloat16, processors=6, everything=True)
    yield conv("B 2, 70 channels 3 x 5 -> 20, 1 x 3", (2, 1, 70, 3, 5), 20, (1, 3), bfloat16)
    yield conv("B 2, 2 images of 20 channels 5 x 5 -> 9, 3 x 3", (2, 2, 20, 5, 5), 9, (3, 3), float32)
    yield conv("B 8, 3 channels 9 x 9 -> 8, 3 x 3, in parts", (8, 1, 3, 9, 9), 8, (3, 3), float32, processors=6)
    yield conv("B 2, 6 channels 7 x 5, 3 x 3, depthwise", (2, 1, 6, 7, 5), 6, (3, 3), bfloat16, groups=6)
    yield embedding("B 3, T 40, 7 tokens, H 70", 3, 40, 7, 70, bfloat16)
    yield embedding("B 5, T 9, 50 tokens, H 600", 5, 9, 50, 600, float32, everything=True)
    yield from scale("[70, 3, 130]", torch.zeros(70, 3, 130, dtype=bfloat16))
    yield from scale("[2, 700, 33] in parts", torch.zeros(2, 700, 33), processors=6, everything=True)
    yield from scale("[9, 64, 49] channels first", torch.zeros(9, 49, 64).transpose(1, 2))
    yield from shared()


def rows(shape: str, x: Tensor, *, ignored: int = 0, softcap: float = 0.0, processors: int = 1) -> Iterator[Case]:
    """Every operator of rows of logits: the first `ignored` ones are."""
    from unlearn_fast.ops.token_kl import triton as kl
    from unlearn_fast.ops.token_logprobs import triton as logprobs

    N, V = x.shape[:-1].numel(), x.shape[-1]
    labels = torch.arange(N) * (V // N)
    labels[:ignored] = -100
    labels, teacher = labels.view(x.shape[:-1]), torch.zeros(x.shape)
    grads, saved = torch.zeros(4, *labels.shape), torch.zeros(4, *labels.shape)
    one, settings = (grads[0], None, None, None), (-100, softcap, 1.0)
    title = shape + f", {ignored} ignored" * bool(ignored) + ", softcap" * bool(softcap)
    sizes = {"N": N, "K": N - ignored, "V": V, "c": 2 if softcap else 1, "t": 4}
    tensors = {"logits": x, "teacher": teacher, "labels": labels}
    backward = ("token_logprobs_backward", logprobs.token_logprobs_backward)
    in_place = ("token_logprobs_backward_", logprobs.token_logprobs_backward_)
    for name, function, *arguments in (
        ("token_logprobs", logprobs.token_logprobs, x, labels, *settings, False),
        ("token_logprobs, statistics", logprobs.token_logprobs, x, labels, *settings, True),
        (*backward, *one, x, labels, *saved, *settings),
        (*in_place, *one, x, labels, *saved, *settings),
        ("token_logprobs_backward, statistics", backward[1], *grads, x, labels, *saved, *settings),
        ("token_kl", kl.token_kl, x, teacher, labels, *settings, 1.0),
        ("token_kl_backward", kl.token_kl_backward, grads[0], x, teacher, labels, *saved, *settings, 1.0),
        ("token_kl_backward_", kl.token_kl_backward_, grads[0], x, teacher, labels, *saved, *settings, 1.0),
    ):
        launch = functools.partial(function, *arguments)
        yield Case(name, title, x.dtype, sizes, launch, tensors, processors)


def sums(x: Tensor, shape: tuple[int, ...], everything: bool) -> tuple[Tensor, Tensor | None, Tensor | None, dict]:
    """out, first and weights of per-example gradients, and their sizes."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out, first, weights = (torch.zeros(s, dtype=wide) for s in (shape, shape, (len(x),)))
    return (out, first, weights, {"m": 2, "q": 1}) if everything else (out, None, None, {})


def linear(
    title: str, B: int, T: int, I: int, O: int, dtype: torch.dtype, *,  # noqa: E741
    everything: bool = False, by_boxes: bool = False, processors: int = 1,
) -> Case:  # fmt: skip
    from unlearn_fast.ops._triton import layouts
    from unlearn_fast.ops.sum_grad_squared_linear.triton import _call

    a, g = torch.zeros(B, T, I, dtype=dtype), torch.zeros(B, T, O, dtype=dtype)
    out, first, weights, settings = sums(a, (O, I), everything)
    tensors = out, first, a, g, weights
    call = _call(*layouts(*tensors), False, "ieee", out.device, processors, by_boxes)
    launch = functools.partial(call, *tensors, 1.0)
    sizes = {"B": B, "T": T, "I": I, "O": O, **settings}
    title, name = title + ", weights and first" * everything, "linear" if T > 1 else "linear, T = 1"
    return Case(name, title, dtype, sizes, launch, {"a": a, "g": g, "out": out}, processors)


def conv(
    title: str, shape: tuple[int, ...], O: int, kernel: tuple[int, int], dtype: torch.dtype, *,  # noqa: E741
    groups: int = 1, processors: int = 1,
) -> Case:  # fmt: skip
    """x [B, W, C, height, width] with its channels innermost in memory, padded by half the kernel."""
    from unlearn_fast.ops.sum_grad_squared_conv.triton import sum_grad_squared_conv_

    B, W, C, *space = shape
    x = torch.zeros(B, W, *space, C, dtype=dtype).movedim(-1, 2)
    g = torch.zeros(B, W, O, *space, dtype=dtype)
    out, *_ = sums(x, (O, C // groups, *kernel), False)
    geometry = ([1, 1], [n // 2 for n in kernel], [1, 1], groups)
    launch = functools.partial(sum_grad_squared_conv_, out, x, g, *geometry, None, None, 1.0, False)
    pixels = space[0] * space[1]
    sizes = {"B": B, "W": W, "C": C, "S": pixels, "O": O, "P": pixels, "G": C // groups, "k": kernel[0] * kernel[1]}
    return Case("conv", title, dtype, sizes, launch, {"x": x, "g": g, "out": out}, processors)


def embedding(title: str, B: int, T: int, V: int, H: int, dtype: torch.dtype, *, everything: bool = False) -> Case:
    """Some tokens more frequent than others, and some negative."""
    from unlearn_fast.ops.sum_grad_squared_embedding.triton import sum_grad_squared_embedding_

    tokens = (torch.arange(B * T) ** 2 % (V + 1) - 1).view(B, T)
    g = torch.zeros(B, T, H, dtype=dtype)
    out, first, weights, settings = sums(g, (V, H), everything)
    launch = functools.partial(sum_grad_squared_embedding_, out, tokens, g, weights, first, 1.0, False)
    found = [set(row) - {-1} for row in tokens.tolist()]
    sizes = {"B": B, "T": T, "H": H, "M": int((tokens >= 0).sum()), "E": sum(map(len, found)), **settings}
    sizes["R"] = len(set.union(*found))
    tensors = {"g": g, "out": out, "tokens": tokens}
    return Case("embedding", title + ", weights and first" * everything, dtype, sizes, launch, tensors)


def scale(title: str, g: Tensor, *, everything: bool = False, processors: int = 1) -> Iterator[Case]:
    from unlearn_fast.ops.sum_grad_squared_scale.triton import sum_grad_squared_scale_

    B, T, C = g.shape
    for name, x in (("scale", torch.zeros_like(g)), ("scale, bias", None)):
        out, first, weights, settings = sums(g, (C,), everything)
        launch = functools.partial(sum_grad_squared_scale_, out, x, g, weights, first, 1.0, False)
        sizes = {"B": B, "T": T, "C": C, **settings}
        tensors = {"g": g, "out": out} | ({} if x is None else {"x": x})
        yield Case(name, title + ", weights and first" * everything, g.dtype, sizes, launch, tensors, processors)


def shared() -> Iterator[Case]:
    from unlearn_fast.ops import _triton

    out, parts, x = torch.zeros(1, 9, 130), torch.zeros(3, 9, 130), torch.zeros(9001, dtype=torch.bfloat16)
    sizes = {"n": 9 * 130, "parts": 3}
    launch = functools.partial(_triton.add_parts, out, parts, 1.0)
    yield Case("add_parts", "3 x [9, 130]", out.dtype, sizes, launch, {"out": out, "parts": parts})
    for name, factor in (("scale_", 2.0), ("scale_ by 1", 1.0)):
        launch = functools.partial(_triton.scale_, x, torch.tensor(factor))
        yield Case(name, "[9001]", x.dtype, {"n": len(x)}, launch, {"x": x})


# -- the table ---------------------------------------------------------------------------------------------------------


def record(case: Case, traffic: Traffic) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {"operator": case.operator, "case": case.title}
    row["dtype"] = str(case.dtype).removeprefix("torch.")
    for kind, least, counted in zip(Work._fields, case.floors(), traffic.work, strict=True):
        row |= {f"floor_{kind}": least, f"counted_{kind}": counted}
        row[f"{kind}_over_floor"] = round(counted / least, 4) if least else None
    row |= {"loaded_bytes": traffic.loads.bytes, "stored_bytes": traffic.stores.bytes}
    return row | {"footprint_bytes": traffic.footprint, "product_flops": traffic.products}


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown. Ratios are to the floors: of bytes also with each address counted once; of exponentials, alone."""
    yield "| operator | case | bytes: floor | counted | ratio | each once | FLOPs: floor | counted | ratio | exp |"
    yield "|---|---|" + "---:|" * 8
    for row in found:
        ratios = [row[f"{kind}_over_floor"] for kind in Work._fields]
        of_bytes, of_flops, of_exponentials = ("-" if r is None else f"{r:.2f}" for r in ratios)
        cells = [row["operator"], f"{row['case']}, {row['dtype']}"]
        cells += [f"{row['floor_bytes']:,}", f"{row['counted_bytes']:,}", of_bytes]
        cells += [f"{row['footprint_bytes'] / row['floor_bytes']:.2f}"]
        cells += [f"{row['floor_flops']:,}", f"{row['counted_flops']:,}", of_flops, of_exponentials]
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unlearn_fast.ops.traffic", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    arguments = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, which the operators do
    found = [record(case, case.run()[0]) for case in cases()]
    print("\n".join(table(found)))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
