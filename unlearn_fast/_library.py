"""Every operator's schema, once, and the compiled parts, loaded once.

Implementations register themselves with PyTorch's dispatcher: the CPU key is served by `_cpu` (C++), the CUDA key by
`_cuda` or by Triton, and every other device, or a missing part, by the plain-torch reference
(CompositeExplicitAutograd).
"""

import functools
import importlib
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

SCHEMAS = {
    "token_logprobs": (
        "(Tensor logits, Tensor labels, int ignore_index, float softcap, float temperature, bool statistics)"
        " -> (Tensor logp, Tensor row_max, Tensor log_sum, Tensor entropy, Tensor mean_logit, Tensor hit)"
    ),
    "token_logprobs_backward": (
        "(Tensor grad_logp, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_mean, Tensor logits, Tensor labels,"
        " Tensor logp, Tensor row_max, Tensor log_sum, Tensor entropy, int ignore_index, float softcap,"
        " float temperature) -> Tensor"
    ),
    "token_logprobs_backward_": (
        "(Tensor grad_logp, Tensor? grad_lse, Tensor? grad_entropy, Tensor? grad_mean, Tensor(a!) logits,"
        " Tensor labels, Tensor logp, Tensor row_max, Tensor log_sum, Tensor entropy, int ignore_index, float softcap,"
        " float temperature) -> ()"
    ),
    "token_kl": (
        "(Tensor logits, Tensor teacher_logits, Tensor labels, int ignore_index, float softcap, float temperature,"
        " float label_penalty)"
        " -> (Tensor kl, Tensor row_max, Tensor log_sum, Tensor teacher_max, Tensor teacher_log_sum)"
    ),
    "token_kl_backward": (
        "(Tensor grad, Tensor logits, Tensor teacher_logits, Tensor labels, Tensor row_max, Tensor log_sum,"
        " Tensor teacher_max, Tensor teacher_log_sum, int ignore_index, float softcap, float temperature,"
        " float label_penalty) -> Tensor"
    ),
    "token_kl_backward_": (
        "(Tensor grad, Tensor(a!) logits, Tensor teacher_logits, Tensor labels, Tensor row_max, Tensor log_sum,"
        " Tensor teacher_max, Tensor teacher_log_sum, int ignore_index, float softcap, float temperature,"
        " float label_penalty) -> ()"
    ),
    "linear_token_logprobs": (
        "(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, int ignore_index, float softcap,"
        " float temperature, int chunk_bytes) -> (Tensor logp, Tensor row_max, Tensor log_sum)"
    ),
    "linear_token_logprobs_backward": (
        "(Tensor grad, Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor logp, Tensor row_max,"
        " Tensor log_sum, int ignore_index, float softcap, float temperature, int chunk_bytes, bool[3] needs)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "sum_grad_squared_linear_": (
        "(Tensor(a!) out, Tensor inputs, Tensor grad_outputs, Tensor? weights, Tensor(b!)? first, float scale,"
        " bool absolute) -> ()"
    ),
    "sum_grad_squared_conv_": (
        "(Tensor(a!) out, Tensor inputs, Tensor grad_outputs, int[] stride, int[] padding, int[] dilation, int groups,"
        " Tensor? weights, Tensor(b!)? first, float scale, bool absolute) -> ()"
    ),
    "sum_grad_squared_embedding_": (
        "(Tensor(a!) out, Tensor tokens, Tensor grad_outputs, Tensor? weights, Tensor(b!)? first, float scale,"
        " bool absolute) -> ()"
    ),
    "sum_grad_squared_scale_": (
        "(Tensor(a!) out, Tensor? inputs, Tensor grad_outputs, Tensor? weights, Tensor(b!)? first, float scale,"
        " bool absolute) -> ()"
    ),
    "dampen_": (
        "(Tensor(a!)[] params, Tensor[] forget, Tensor[] reference, float[] alpha, float[] lam, float exponent,"
        " float cap, float floor) -> Tensor"
    ),
    "dampen_record": (
        "(Tensor[] params, Tensor[] forget, Tensor[] reference, float[] alpha)"
        " -> (Tensor counts, Tensor offsets, Tensor values)"
    ),
    "dampen_undo_": "(Tensor(a!)[] params, Tensor counts, Tensor offsets, Tensor values) -> ()",
    "alpha_for_percentile": ("(Tensor[] forget, Tensor[] reference, float[] q) -> (Tensor neighbours, Tensor count)"),
    "selection_curve": "(Tensor[] forget, Tensor[] reference, float[] alphas) -> Tensor",
    "top_fraction_mask": "(Tensor[] scores, int count) -> Tensor[]",
}

# Served by Triton on CUDA: by the function of the same name in `unlearn_fast.ops.<name>.triton`, where a backward is in
# its forward's folder.
TRITON = (
    "token_logprobs",
    "token_logprobs_backward",
    "token_logprobs_backward_",
    "token_kl",
    "token_kl_backward",
    "token_kl_backward_",
    "sum_grad_squared_linear_",
    "sum_grad_squared_conv_",
    "sum_grad_squared_embedding_",
    "sum_grad_squared_scale_",
)

LIBRARY = torch.library.Library("unlearn_fast", "DEF")
for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)

_PACKAGE = Path(__file__).parent

missing: dict[str, str] = {}
"""Part ("cpu", "cuda", "native", "triton") -> why it does not serve here."""


def _build_reason() -> str:
    record = _PACKAGE / "_build.json"
    if not record.exists():
        return "the package was not built: run `pip install .`"
    return json.loads(record.read_text())["missing"] or "the file is missing although the build succeeded: reinstall"


def _load(part: str) -> None:
    file = _PACKAGE / f"_{part}.so"
    if not file.exists():
        missing[part] = _build_reason()
        return
    try:
        torch.ops.load_library(file)
    except OSError as error:
        missing[part] = f"{file.name} cannot be loaded: {error}"


def _load_native() -> ModuleType | None:
    if not any(_PACKAGE.glob("_native*.so")):  # only the one beside this file: an import would find others too
        missing["native"] = _build_reason()
        return None
    try:
        return importlib.import_module("unlearn_fast._native")
    except ImportError as error:
        missing["native"] = f"_native cannot be loaded: {error}"
        return None


_load("cpu")
native = _load_native()
if torch.version.cuda is None:
    missing["cuda"] = f"torch {torch.__version__} has no CUDA"
elif native is not None and native.build_info()["cuda_missing"]:
    missing["cuda"] = native.build_info()["cuda_missing"]
else:
    _load("cuda")


def _implement_in_triton(name: str) -> None:
    """Registers a function for the CUDA key that imports triton at its first call, and not before."""

    @functools.cache
    def launcher() -> Callable[..., Any]:
        folder = name.rstrip("_").removesuffix("_backward")
        return getattr(importlib.import_module(f"unlearn_fast.ops.{folder}.triton"), name)

    LIBRARY.impl(name, lambda *arguments: launcher()(*arguments), "CUDA")


_triton = importlib.util.find_spec("triton")
if _triton is None or _triton.origin is None:  # a folder that happens to be called triton has no origin
    missing["triton"] = "triton is not installed: `pip install triton`"
else:
    for _name in TRITON:
        _implement_in_triton(_name)


def implement(name: str, function: Callable[..., Any], key: str = "CompositeExplicitAutograd") -> None:
    """Registers `function` for the operator `name` under a key; by default for all devices without their own."""
    LIBRARY.impl(name, function, key)


def fake(name: str, function: Callable[..., Any]) -> None:
    """Registers the shapes and dtypes of the operator's results, which is what torch.compile traces."""
    torch.library.register_fake(f"unlearn_fast::{name}", function, lib=LIBRARY)


def differentiate(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
    """Registers the operator's derivative."""
    torch.library.register_autograd(f"unlearn_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def not_twice_differentiable(name: str) -> None:
    """Makes a second derivative an error that says so, rather than a silent zero."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"unlearn_fast::{name} has no derivative: only first derivatives are supported")

    differentiate(name, backward)


def implementation(name: str, device: str) -> str:
    """What serves the operator `name` on a device type: "c++", "cuda", "triton" or "reference"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    if key and torch._C._dispatch_has_kernel_for_dispatch_key(f"unlearn_fast::{name}", key):
        return "c++" if key == "CPU" else part_on(name, device)
    return "reference"


def part_on(name: str, device: str) -> str:
    """The part that serves the operator `name` on a device type, where it is not missing."""
    return "triton" if device == "cuda" and name in TRITON else device


_warned: set[str] = set()


def warn_if_slow(device: str, name: str = "") -> None:
    """Warns, once for a device type, that the part that would serve the operator `name` there is missing."""
    part = part_on(name, device)
    if part in missing and device not in _warned and not torch.compiler.is_compiling():
        _warned.add(device)
        warnings.warn(
            f"unlearn_fast runs its slow plain-torch references on {device}: {missing[part]}."
            " `unlearn_fast info` tells more.",
            RuntimeWarning,
            stacklevel=3,
        )
