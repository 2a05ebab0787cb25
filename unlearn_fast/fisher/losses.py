"""Ready-made per-example losses for `diagonal_fisher`: `losses(model, batch) -> [B]`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_fast.ops.token_logprobs import token_logprobs


def classification_losses(model: nn.Module, batch: Any) -> Tensor:  # [B]
    """Cross entropy of each example.

    Batches are `(x, y)`, `(x, _, y)` as the released SSD data loaders give them, or a mapping with the target under
    "labels", "label" or "y" and the inputs under the model's own argument names. The model returns logits [B, C], or an
    object with `.logits`.
    """
    inputs, target = _inputs_and_target(batch)
    logits = _logits(_call(model, inputs))
    target = target.to(logits.device)
    target = target if target.is_floating_point() else target.long()
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise ValueError(
            f"the model's logits have shape {list(logits.shape)} and the target {list(target.shape)}:"
            " classification_losses needs [B, C] and [B]; write a losses function for another task"
        )
    return nn.functional.cross_entropy(logits, target, reduction="none")


def causal_lm_losses(model: nn.Module, batch: Any) -> Tensor:  # [B]
    """Mean negative log-likelihood of each sequence's labelled tokens (0 where none is labelled).

    Batches are mappings with "input_ids" [B, T], usually "attention_mask", and "labels" [B, T] (-100 ignored; without
    labels, the inputs that attention_mask keeps). Labels are shifted by one here: position t predicts label t + 1.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise TypeError("batch must be a mapping with 'input_ids' [B, T], and usually 'attention_mask' and 'labels'")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    config = getattr(model, "config", None)
    if hasattr(config, "use_cache"):
        inputs.setdefault("use_cache", False)
    logits = _logits(_call(model, inputs))
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100).to(logits.device)
    count = (shifted != -100).sum(-1)
    return -token_logprobs(logits, shifted).sum(-1) / count.clamp(min=1)


def output_norm_losses(model: nn.Module, batch: Any) -> Tensor:  # [B]
    """Squared l2 norm of each example's output: importance without labels.

    Batches are inputs, or any batch of `classification_losses`, whose target is then not used.
    Source: Foster et al., "Loss-Free Machine Unlearning" (LFSSD), 2024.
    """
    if isinstance(batch, Mapping):
        inputs: Any = {name: value for name, value in batch.items() if name not in ("labels", "label", "y")}
    else:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    return _logits(_call(model, inputs)).flatten(1).square().sum(-1)


def _inputs_and_target(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping):
        for name in ("labels", "label", "y"):
            if name in batch:
                return {key: value for key, value in batch.items() if key != name}, batch[name]
        raise TypeError(f"batch has the keys {list(batch)}: the target must be under 'labels', 'label' or 'y'")
    if isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        return batch[0], batch[-1]
    raise TypeError(f"batch is a {type(batch).__name__}: it must be (x, y), (x, _, y) or a mapping")


def _call(model: nn.Module, inputs: Any) -> Any:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
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
