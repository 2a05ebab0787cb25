"""Diagonal Fisher information of any module, exact per example."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_fast.fisher.batches import batch_size, examples
from unlearn_fast.fisher.gradients import wide
from unlearn_fast.fisher.importance import Importance, model_fingerprint
from unlearn_fast.fisher.taps import Call, Taps

Losses = Callable[[nn.Module, Any], Tensor]

NO_GRADIENT = "losses depends on no parameter: it must run the model, and not under torch.no_grad()"

# How far the fast and the one-example gradients may differ on the first examples before the fast ones are given up.
# A wrong attribution to examples is off by about 1; rounding by far less, in 16-bit models less than 1e-2.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    losses: Losses,
    *,
    mode: str = "per_example",
    progress: bool = True,
) -> Importance:
    """Diagonal empirical Fisher information of every parameter.

    mode="per_example" (the published definition): `F_i = (1/N) sum_n (d loss_n / d theta_i)^2`, one square an example.
    Exact for any module and independent of batch size and order. Linear, Conv2d, Embedding, LayerNorm and BatchNorm
    cost about one ordinary backward; every other parameter is measured one example at a time, and one warning names the
    modules. The first batch is checked: two of its examples are also run one at a time, and parameters whose fast
    result disagrees (weights used outside their module, say) go the one-example way too. What the first two examples
    cannot show, the check cannot find: see docs/methods.md for models that route examples by their content.
    mode="batch" (the released code): `(1/batches) sum_b (d mean_n loss_n / d theta_i)^2`, which depends on batch size
    and order and agrees with the definition only at batch size 1.

    The model runs in eval mode (dropout off, BatchNorm on its running statistics). Training mode, requires_grad and
    hooks are restored whatever happens. Frozen and unused parameters have importance 0.

    Args:
        model: any module.
        batches: iterable of batches: tensors, tuples, lists or mappings of tensors of leading size B.
        losses: `losses(model, batch) -> [B]`, the loss of each example, not their mean: `classification_losses`,
            `causal_lm_losses`, `output_norm_losses`, or your own.
        mode: "per_example" or "batch".
        progress: show a progress bar.

    Returns:
        An `Importance`: name -> float32 tensor, with metadata; accumulated in float32 (float64 for float64 models).

    Raises:
        ValueError: unknown mode; no batches; losses that are not [B] or have no gradient; a BatchNorm that uses the
            statistics of the batch, which couples examples.

    Source: Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
    Dampening", AAAI 2024.
    """
    if mode not in ("per_example", "batch"):
        raise ValueError(f"mode is {mode!r}: it must be 'per_example' or 'batch'")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fingerprint = model_fingerprint(model)
    sums = {
        name: torch.zeros_like(p, dtype=wide(p), memory_format=torch.contiguous_format)
        for name, p in parameters.items()
    }
    count = batch_count = 0
    with _prepared(model, parameters):
        pass_ = _PerExample(model, parameters, losses, sums) if mode == "per_example" else None
        for batch in _with_progress(batches, progress):
            B = batch_size(batch)
            if B == 0:
                continue
            if pass_ is not None:
                pass_.add(batch, B)
            else:
                _add_batch_gradient(model, parameters, losses, batch, B, sums)
            count, batch_count = count + B, batch_count + 1
        if pass_ is not None and count and parameters and not pass_.saw_gradient:
            raise ValueError(NO_GRADIENT)
    if count == 0:
        raise ValueError("batches held no examples: it must hold at least one")
    divisor = float(count if mode == "per_example" else batch_count)
    tensors: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        zero = torch.zeros((), device=param.device).expand(param.shape)
        tensors[name] = sums[name].div_(divisor).float() if name in sums else zero
    return Importance(tensors, examples=count, batches=batch_count, mode=mode, fingerprint=fingerprint)


class _PerExample:
    """Adds the squares of every example of a batch to `sums`."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], losses: Losses, sums: dict[str, Tensor]
    ) -> None:
        self.model, self.parameters, self.losses, self.sums = model, parameters, losses, sums
        self.taps = Taps(model, parameters)
        covered = {param for own in self.taps.covered.values() for param in own.values()}
        self.slow = {name: "it has no fast rule" for name in parameters if name not in covered}
        self.growth: dict[Call, int | None] = {}  # how each call's leading axis grows with the batch; None: unknown
        self.saw_gradient = False
        self.checked = 0  # examples of the first check; with one only, batch axes cannot be told apart

    def add(self, batch: Any, B: int) -> None:
        if self.checked < min(2, B):
            self._check(batch, min(2, B))
        fast = {name: total for name, total in self.sums.items() if name not in self.slow}
        unfit = self._add_fast(batch, B, fast, self.growth) if fast else set()
        self._add_slow(batch, B, [name for name in self.parameters if name in self.slow or name in unfit], self.sums)

    def _check(self, batch: Any, n: int) -> None:
        """Learns the calls' layout, and compares the fast squares of n examples with those of one at a time."""
        names = [name for name in self.parameters if name not in self.slow]
        exact = {name: torch.zeros_like(self.sums[name]) for name in names}
        with self.taps.watch() as single:
            self._add_slow(examples(batch, 0, 1), 1, names, exact)
        if n > 1:
            self._add_slow(examples(batch, 1, 2), 1, names, exact)
        both = examples(batch, 0, n)
        with self.taps.watch() as many:
            self._losses(both, n)
        self.growth = {call: _growth(single[call], many.get(call), n) for call in single}
        fast = {name: torch.zeros_like(self.sums[name]) for name in names}
        unfit: set[str] = set()
        for _ in range(2):
            try:
                unfit = self._add_fast(both, n, fast, self.growth)
                break
            except Exception as failure:  # the model itself works, as the single examples have shown
                # Perhaps an output that the batch shares was expanded over the examples, which the model cannot take.
                expanded = [call for call, grows in self.growth.items() if grows == 0]
                self.growth.update(dict.fromkeys(expanded))
                for total in fast.values():
                    total.zero_()
                if not expanded:
                    self.slow.update(
                        dict.fromkeys(names, f"its fast pass failed ({type(failure).__name__}: {failure})")
                    )
                    break
        names = [name for name in names if name not in self.slow]
        largest = max((float(total.norm()) for total in exact.values()), default=0.0)
        for name in names:
            dtype = self.parameters[name].dtype
            # A gradient that is mathematically zero (an attention key's bias) is rounding noise in both.
            noise = (64 * torch.finfo(torch.float32).eps) ** 2 * largest
            error = float((fast[name] - exact[name]).norm())
            if name in unfit:
                self.slow[name] = "its module's input has no batch axis in front, or its options no fast rule"
            elif bool(exact[name].any()) and not bool(fast[name].any()):
                self.slow[name] = "it is used outside its module only"
            elif not error <= TOLERANCE.get(dtype, 1e-3) * float(exact[name].norm()) + noise:
                self.slow[name] = "it is also used outside its module, or mixed between examples"
        self.checked = n
        if self.slow:
            self._warn()

    def _add_fast(self, batch: Any, n: int, sums: Mapping[str, Tensor], growth: Mapping[Call, int | None]) -> set[str]:
        """Returns the parameters that could not be served in this batch; their sums are untouched."""
        with self.taps.accumulate(sums, n, growth) as accumulation:
            accumulation.backward(self._losses(batch, n))
        return accumulation.unfit & sums.keys()

    def _add_slow(self, batch: Any, B: int, names: list[str], sums: Mapping[str, Tensor]) -> None:
        """One example at a time, for the named parameters only."""
        if not names:
            return
        chosen = [self.parameters[name] for name in names]
        for param in chosen:
            param.requires_grad_(True)
        try:
            for b in range(B):
                loss = self._losses(examples(batch, b, b + 1), 1).sum()
                if not loss.requires_grad:  # none of these parameters is used
                    continue
                for name, grad in zip(names, torch.autograd.grad(loss, chosen, allow_unused=True), strict=True):
                    if grad is not None:
                        grad = grad.to_dense() if grad.layout != torch.strided else grad
                        sums[name].add_(grad.to(sums[name].dtype).square())
        finally:
            for param in chosen:
                param.requires_grad_(False)

    def _losses(self, batch: Any, B: int) -> Tensor:
        values = _checked_losses(self.losses(self.model, batch), B)
        self.saw_gradient |= values.requires_grad
        return values

    def _warn(self) -> None:
        owners: dict[str, str] = {}
        for module_name, module in self.model.named_modules():
            for key in module._parameters:
                full = f"{module_name}.{key}" if module_name else key
                if full in self.slow:
                    owners[f"{module_name or 'the model itself'} ({type(module).__name__})"] = self.slow[full]
        listed = "; ".join(f"{owner}: {why}" for owner, why in list(owners.items())[:8])
        more = f"; and {len(owners) - 8} more" if len(owners) > 8 else ""
        warnings.warn(f"measured one example at a time, exact but slow: {listed}{more}", UserWarning, stacklevel=4)


def _growth(single: int, many: int | None, n: int) -> int | None:
    """Leading entries an example; 0 where the leading axis does not depend on the batch; None where it is neither."""
    if many == n * single:
        return single
    return 0 if many == single else None


def _add_batch_gradient(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    losses: Losses,
    batch: Any,
    B: int,
    sums: dict[str, Tensor],
) -> None:
    for param in parameters.values():
        param.requires_grad_(True)
    loss = _checked_losses(losses(model, batch), B).mean()
    if not loss.requires_grad:
        raise ValueError(NO_GRADIENT)
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for total, grad in zip(sums.values(), grads, strict=True):
        if grad is not None:
            grad = grad.to_dense() if grad.layout != torch.strided else grad
            total.add_(grad.to(total.dtype).pow(2))


def _checked_losses(values: Any, B: int) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (B,):
        got = f"shape {list(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ValueError(
            f"losses returned {got} for a batch of {B}: it must return [B], one loss an example, not their mean"
        )
    return values


def _with_progress(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from tqdm.auto import tqdm

    return tqdm(batches, desc="diagonal Fisher", unit="batch", leave=False)


@contextmanager
def _prepared(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode, gradients on and every requires_grad off; everything as it was afterwards, exceptions included."""
    training = [(module, module.training) for module in model.modules()]
    handles = [
        module.register_forward_pre_hook(_refuse_batch_statistics(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    try:
        model.eval()
        for param in parameters.values():
            param.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag
        for param in parameters.values():
            param.requires_grad_(True)


def _refuse_batch_statistics(name: str) -> Callable[[nn.Module, Any], None]:
    def check(module: Any, args: Any) -> None:
        if module.training or module.running_mean is None:
            raise ValueError(
                f"BatchNorm {name!r} uses the statistics of the batch, which couples its examples:"
                " it must keep running statistics and be in eval mode"
            )

    return check
