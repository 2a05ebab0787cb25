"""Ready-made per-example losses for `diagonal_fisher`: `losses(model, batch) -> [B]`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlearn_fast.ops.token_logprobs import token_logprobs


class WeightedLosses(NamedTuple):
    """Several weighted losses an example: the importance is `sum_k weights[b, k] (d losses[b, k])^2`, a mean over b."""

    losses: Tensor  # [B, K]
    weights: Tensor  # [B, K], constant


def classification_losses(model: nn.Module, batch: Any, labels: str = "true") -> Tensor | WeightedLosses:  # [B]
    """Cross entropy of each example.

    Batches are `(x, y)`, `(x, _, y)` as the released SSD data loaders give them, or a mapping with the target under
    "labels", "label" or "y" and the inputs under the model's own argument names. The model returns logits [B, C], or an
    object with `.logits`.

    labels: "true", the targets of the batch: the empirical Fisher information, which SSD uses; "sampled", drawn from
        the model's own distribution by torch's random numbers, one draw an example; or "all", every class weighted by
        its probability: the exact Fisher information of the model, at one backward a class. The last two do not use the
        targets, and take batches without them. Choose with `functools.partial(classification_losses, labels="all")`.
    """
    _check_labels(labels, ("true", "sampled", "all"))
    inputs, target = _inputs_and_target(batch) if labels == "true" else (_inputs_alone(batch), None)
    target = None if target is None else target.to(_device(model))  # now: later it would wait for the model's kernels
    logits = _logits(_call(model, inputs))
    if logits.dim() != 2:
        raise ValueError(
            f"the model's logits have shape {list(logits.shape)}: classification_losses needs [B, C];"
            " write a losses function for another task"
        )
    if labels == "all":
        logp = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return WeightedLosses(-logp, logp.detach().exp())
    target = _sampled(logits) if target is None else target.to(logits.device)
    target = target if target.is_floating_point() else target.long()
    if target.shape != logits.shape[:1]:
        raise ValueError(
            f"the model's logits have shape {list(logits.shape)} and the target {list(target.shape)}:"
            " classification_losses needs [B, C] and [B]; write a losses function for another task"
        )
    return nn.functional.cross_entropy(logits, target, reduction="none")


def causal_lm_losses(model: nn.Module, batch: Any, labels: str = "true") -> Tensor:  # [B]
    """Mean negative log-likelihood of each sequence's labelled tokens (0 where none is labelled).

    Batches are mappings with "input_ids" [B, T], usually "attention_mask", and "labels" [B, T] (-100 ignored; without
    labels, the inputs that attention_mask keeps). Labels are shifted by one here: position t predicts label t + 1.

    labels: "true", or "sampled": the labelled positions get tokens drawn from the model's own distribution there, by
        torch's random numbers.
    """
    _check_labels(labels, ("true", "sampled"))
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise TypeError("batch must be a mapping with 'input_ids' [B, T], and usually 'attention_mask' and 'labels'")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    target = batch.get("labels")
    if target is None:
        target = batch["input_ids"]
        if "attention_mask" in batch:
            target = target.masked_fill(batch["attention_mask"] == 0, -100)
    config = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        inputs.setdefault("use_cache", False)
    shifted = torch.nn.functional.pad(target[:, 1:], (0, 1), value=-100)
    shifted = shifted.to(_device(model))  # now: later it would wait for the model's kernels
    logits = _logits(_call(model, inputs))
    shifted = shifted.to(logits.device)
    if labels == "sampled":
        shifted = torch.where(shifted == -100, shifted, _sampled(logits))
    count = (shifted != -100).sum(-1)
    return -token_logprobs(logits, shifted).sum(-1) / count.clamp(min=1)


def _check_labels(labels: str, known: tuple[str, ...]) -> None:
    if labels not in known:
        raise ValueError(f"labels is {labels!r}: it must be one of {', '.join(map(repr, known))}")


def _sampled(logits: Tensor) -> Tensor:  # [..., C] -> [...]
    """Classes drawn from the softmax of the logits, by inverting its cumulative sums. One random number a row, in
    order: the rows of a batch draw the same whatever rows follow them."""
    with torch.no_grad():
        sums = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).cumsum(-1)
        u = torch.rand(logits.shape[:-1].numel(), dtype=torch.float64).to(logits.device, sums.dtype, non_blocking=True)
        u = u.view(*logits.shape[:-1], 1) * sums[..., -1:]
        return torch.searchsorted(sums, u, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)


def output_norm_losses(model: nn.Module, batch: Any) -> Tensor:  # [B]
    """Squared l2 norm of each example's output: importance without labels.

    Batches are inputs, or any batch of `classification_losses`, whose target is then not used.
    Source: Foster et al., "Loss-Free Machine Unlearning" (LFSSD), 2024.
    """
    return _logits(_call(model, _inputs_alone(batch))).flatten(1).square().sum(-1)


def _inputs_and_target(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping):
        for name in ("labels", "label", "y"):
            if name in batch:
                return {key: value for key, value in batch.items() if key != name}, batch[name]
        raise TypeError(f"batch has the keys {list(batch)}: the target must be under 'labels', 'label' or 'y'")
    if isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        return batch[0], batch[-1]
    raise TypeError(f"batch is a {type(batch).__name__}: it must be (x, y), (x, _, y) or a mapping")


def _inputs_alone(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name not in ("labels", "label", "y")}
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _call(model: nn.Module, inputs: Any) -> Any:
    device = _device(model)
    if isinstance(inputs, Mapping):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()})
    return model(inputs.to(device))


def _logits(output: Any) -> Tensor:
    output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)):
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the model returned a {type(output).__name__}: it must return logits, or an object with .logits"
        )
    return output
