"""Diagonal Fisher information of any module, exact per example."""

import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_fast.fisher.accumulation import Accumulation, Checkpoint
from unlearn_fast.fisher.gradients import dense
from unlearn_fast.fisher.importance import Importance, model_fingerprint
from unlearn_fast.fisher.per_example import Losses, PerExample, checked_losses
from unlearn_fast.fisher.progress import with_progress

NO_GRADIENT = "losses depends on no parameter: it must run the model, and not under torch.no_grad()"


def diagonal_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    losses: Losses,
    *,
    mode: str = "per_example",
    first_moment: bool = False,
    target_error: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
) -> Importance:
    """Diagonal empirical Fisher information of every parameter.

    mode="per_example" (the published definition): `F_i = (1/N) sum_n (d loss_n / d theta_i)^2`, one square an example.
    Exact for any module and independent of batch size and order, at about the price of one ordinary backward. What
    serves a parameter tells `coverage`; what no rule covers is measured one example at a time, and one warning names
    it. The attribution of gradients to examples is proved on the first batch, and again whenever the model does
    something new: see docs/methods.md.
    mode="absolute": `(1/N) sum_n |d loss_n / d theta_i|`, the importance of label-free variants, in the same way.
    mode="batch" (the released code): `(1/batches) sum_b (d mean_n loss_n / d theta_i)^2`, which depends on batch size
    and order and agrees with the definition only at batch size 1.

    The model runs in eval mode (dropout off, BatchNorm on its running statistics). Training mode, requires_grad and
    hooks are restored whatever happens. Frozen and unused parameters have importance 0.

    Args:
        model: any module.
        batches: iterable of batches: tensors, tuples, lists or mappings of tensors of leading size B.
        losses: `losses(model, batch) -> [B]`, the loss of each example, not their mean: `classification_losses`,
            `causal_lm_losses`, `output_norm_losses`, or your own; or `WeightedLosses` of [B, K].
        mode: "per_example", "absolute" or "batch".
        first_moment: also measure the mean gradient (`Importance.first_moment`, `Importance.variance`), in the same
            pass. Not in mode "batch".
        target_error: stop early, once the standard error of the importances, estimated from their spread over batches,
            is below this share of them (norms over all parameters; after 4 batches at the earliest). The batches must
            come in random order. `Importance.relative_error` tells what was reached. Takes two more tensors the size
            of the parameters.
        checkpoint: a file that keeps the state every `checkpoint_seconds`. If it exists, measuring goes on from there
            with the same result, provided the same batches come in the same order; it is removed at the end.
        progress: show a progress bar.

    Returns:
        An `Importance`: name -> float32 tensor, with metadata; accumulated in float32 (float64 for float64 models).

    Raises:
        ValueError: unknown mode; no batches; losses that are not [B] or have no gradient; a BatchNorm that uses the
            statistics of the batch, or an Embedding with scale_grad_by_freq, which couple examples; a checkpoint of
            another measurement.
        RuntimeError: parameters of the model are being measured already; or gradients that reached the right examples
            at first no longer do.

    Source: Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
    Dampening", AAAI 2024.
    """
    if mode not in ("per_example", "absolute", "batch"):
        raise ValueError(f"mode is {mode!r}: it must be 'per_example', 'absolute' or 'batch'")
    if mode == "batch" and first_moment:
        raise ValueError("first_moment is True in mode 'batch': it needs mode 'per_example' or 'absolute'")
    if target_error is not None and (mode == "batch" or not target_error > 0):
        raise ValueError(
            f"target_error is {target_error!r}, mode {mode!r}: it must be positive, and not in mode 'batch'"
        )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = {"mode": mode, "first_moment": first_moment, "target_error": target_error is not None}
    settings |= {"losses": _name(losses), "parameters": hashlib.sha256(repr(list(parameters)).encode()).hexdigest()}
    settings["model"] = fingerprint = model_fingerprint(model)
    sums = Accumulation(parameters, absolute=mode == "absolute", first=first_moment, spread=target_error is not None)
    file = None if checkpoint is None else Checkpoint(checkpoint, checkpoint_seconds, settings)
    with prepared(model, parameters):
        add: Any
        if mode == "batch":
            add = _BatchGradients(model, parameters, losses, sums.tensors["second"])
        else:
            add = PerExample(model, parameters, losses, sums.moments)
        measured = _run(batches, add, sums, file, target_error, progress)
        if measured and not add.saw_gradient:
            raise ValueError(NO_GRADIENT)
    if sums.examples == 0:
        raise ValueError("batches held no examples: it must hold at least one")
    if file is not None:
        file.remove()
    error = sums.relative_error() if target_error is not None else None

    def means(kind: str) -> dict[str, Tensor]:
        divisor = float(sums.batches if mode == "batch" else sums.examples)
        zeros = {n: torch.zeros((), device=p.device).expand(p.shape) for n, p in model.named_parameters()}
        return zeros | {n: t.div_(divisor).float() for n, t in sums.tensors[kind].items()}

    return Importance(
        means("second"), examples=sums.examples, batches=sums.batches, mode=mode, fingerprint=fingerprint,
        relative_error=error, first_moment=means("first") if first_moment else None,
    )  # fmt: skip


def _run(
    batches: Iterable[Any],
    add: Any,
    sums: Accumulation,
    file: Checkpoint | None,
    target_error: float | None,
    progress: bool,
) -> int:
    """Returns how many batches were measured here, those of the file not counted."""
    random_numbers = file.load(sums) if file is not None else None
    done, index = sums.batches, -1
    for index, (batch, n) in enumerate(with_progress(batches, progress, "diagonal Fisher")):
        if file is not None and index == 0:
            file.check_first(batch, resumed=random_numbers is not None)
        if index < done:
            if random_numbers is not None and index == done - 1:  # before the next batch is drawn
                torch.set_rng_state(random_numbers)
            continue
        add.add(batch, n)
        sums.finish_batch(n)
        if target_error is not None and sums.relative_error() <= target_error:
            break
        if file is not None:
            file.save(sums)
    if file is not None and index + 1 < done:
        file.refuse(f"holds {done} batches, and only {index + 1} came: it needs the same ones, in the same order")
    return sums.batches - done


class _BatchGradients:
    """Squares of batch-mean gradients, with the released code's bits."""

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], losses: Losses, sums: Mapping[str, Tensor]
    ) -> None:
        self.model, self.parameters, self.losses, self.sums = model, parameters, losses, sums
        self.saw_gradient = True

    def add(self, batch: Any, n: int) -> None:
        for param in self.parameters.values():
            param.requires_grad_(True)
        given = self.losses(self.model, batch)
        loss = checked_losses(given, n).mean()
        if not loss.requires_grad:
            raise ValueError(NO_GRADIENT)
        grads = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        used = [(self.sums[name], dense(g)) for name, g in zip(self.parameters, grads, strict=True) if g is not None]
        if used:
            sums, squares = [s for s, _ in used], [g.to(s.dtype) for s, g in used]
            torch._foreach_mul_(squares, squares)
            torch._foreach_add_(sums, squares)


_measured: set[int] = set()  # the identities of parameters that are switched off by a measurement


@contextmanager
def prepared(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode, gradients on and every requires_grad off; everything as it was afterwards, exceptions included."""
    own = {id(param) for param in model.parameters()}
    if own & _measured:
        raise RuntimeError("the model is being measured already: measure it once at a time, or copies of it")
    for name, param in parameters.items():
        if not param.is_floating_point():
            raise TypeError(
                f"parameter {name!r} has dtype {param.dtype}: importances need real floating-point parameters"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
            raise ValueError(
                f"Embedding {name!r} has scale_grad_by_freq=True, which divides gradients by how often a token occurs"
                " in the batch, so that no example has a gradient of its own: it must be False"
            )
    training = [(module, module.training) for module in model.modules()]
    handles = [
        module.register_forward_pre_hook(_refuse_batch_statistics(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    _measured.update(own)
    try:
        model.eval()
        for param in parameters.values():
            param.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad(), _uncompiled():
            yield
    finally:
        _measured.difference_update(own)
        for handle in handles:
            handle.remove()
        for param in parameters.values():
            param.requires_grad_(True)
        try:
            model.train(training[0][1])  # modules may do more in it than set their flags
        finally:
            for module, flag in training:
                module.training = flag


def _name(losses: Any) -> str:
    """Tells a checkpoint of other losses, as far as names can: the same in every process, so without addresses."""
    if isinstance(losses, functools.partial):
        bound = [*losses.args, *itertools.chain.from_iterable(sorted(losses.keywords.items()))]
        return " ".join(map(_name, (losses.func, *bound)))
    if isinstance(losses, (str, int, float, type(None))):
        return repr(losses)
    return getattr(losses, "__qualname__", type(losses).__qualname__)


def _uncompiled() -> Any:
    """Compiled models run as they were written: compiled code shows no functions. Without dynamo there are none."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _refuse_batch_statistics(name: str) -> Callable[[nn.Module, Any], None]:
    def check(module: Any, args: Any) -> None:
        if module.training or module.running_mean is None:
            raise ValueError(
                f"BatchNorm {name!r} uses the statistics of the batch, which couples its examples:"
                " it must keep running statistics and be in eval mode"
            )

    return check
