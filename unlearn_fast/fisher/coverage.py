"""Which rule serves each parameter."""

from typing import Any

import torch
from torch import nn

from unlearn_fast.fisher.accumulation import Accumulation
from unlearn_fast.fisher.batches import batch_size, examples
from unlearn_fast.fisher.diagonal import prepared
from unlearn_fast.fisher.per_example import Losses, PerExample
from unlearn_fast.fisher.rules import module_rule

# Modules of torch whose forward is made of functions with a known rule: module type -> rule.
EXPECTED: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "convolution",
    nn.Conv2d: "convolution",
    nn.Conv3d: "convolution",
    nn.ConvTranspose1d: "conv_transpose",
    nn.ConvTranspose2d: "conv_transpose",
    nn.ConvTranspose3d: "conv_transpose",
    nn.Embedding: "embedding",
    nn.LayerNorm: "layer_norm",
    nn.RMSNorm: "rms_norm",
    nn.GroupNorm: "group_norm",
    nn.modules.instancenorm._InstanceNorm: "instance_norm",
    nn.modules.batchnorm._BatchNorm: "batch_norm",
    nn.PReLU: "prelu",
    nn.MultiheadAttention: "linear",
}
UNKNOWN = "found on the first batch"
FROZEN = "frozen"
SLOW = "one example at a time"


def coverage(model: nn.Module, batch: Any = None, losses: Losses | None = None) -> dict[str, str]:
    """Which rule serves each parameter of the model: name -> rule.

    Rules are named after the functions that parameters enter: "linear", "convolution", "embedding", "layer_norm", ...;
    "broadcast" for parameters that meet the data elementwise (`x * gain`, `x + position`) or are expanded over the
    batch; a module's class where that has a rule of its own; several are joined by " + ". "frozen" parameters take no
    gradient. "one example at a time: why" is exact, and slow.

    Without a batch, the answer follows from the modules' types, and is "found on the first batch" for parameters of
    modules that torch does not define: rules follow the functions that a model calls, not its modules. With a batch (at
    least two examples) and losses, both as for `diagonal_fisher`, the model runs on two of its examples, every rule is
    checked there, and the answer is complete.

    Raises:
        ValueError: a batch without losses, or of fewer than two examples; and what `diagonal_fisher` raises.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: FROZEN for name, _ in model.named_parameters()}
    if batch is None:
        return found | _expected(model, parameters)
    if losses is None:
        raise ValueError("losses is missing: it must be given together with batch")
    if batch_size(batch) < 2:
        raise ValueError("batch holds a single example: with fewer than two, examples cannot be told apart")
    with prepared(model, parameters):
        pass_ = PerExample(model, parameters, losses, Accumulation(parameters).moments, warn=False)
        pass_.add(examples(batch, 0, 2), 2)
    served = pass_.plan.served if pass_.plan is not None else {}
    for name in parameters:
        if name in pass_.slow:
            found[name] = f"{SLOW}: {pass_.slow[name]}"
        else:
            found[name] = " + ".join(sorted(served.get(name, ()))) or "unused"
    return found


def _expected(model: nn.Module, parameters: dict[str, torch.nn.Parameter]) -> dict[str, str]:
    names = {id(p): name for name, p in parameters.items()}
    found: dict[str, set[str]] = {}
    for module in model.modules():
        rule = _rule_of(module)
        for key, p in module.named_parameters(recurse=module_rule(module) is not None):
            if id(p) in names:
                extra_keys = isinstance(module, nn.MultiheadAttention) and key in ("bias_k", "bias_v")
                found.setdefault(names[id(p)], set()).add("broadcast" if extra_keys else rule)
    return {name: UNKNOWN if UNKNOWN in rules else " + ".join(sorted(rules)) for name, rules in found.items()}


def _rule_of(module: nn.Module) -> str:
    if module_rule(module) is not None:
        return type(module).__name__
    for base in type(module).__mro__:
        if base in EXPECTED:
            # A parametrized module is a subclass whose weight is computed by other modules.
            return EXPECTED[base] if type(module).forward is base.forward else UNKNOWN
    return UNKNOWN
