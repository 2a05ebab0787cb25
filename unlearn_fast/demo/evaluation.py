"""What the demo measures: accuracy, membership inference, and the probability of answers."""

from typing import Any

import torch
from torch import Tensor, nn

from unlearn_fast.ops.token_logprobs import token_logprobs


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch: int = 256) -> Tensor:  # [N, ...] -> [N, classes]
    """Logits in eval mode."""
    model.eval()
    return torch.cat([model(part) for part in x.split(batch)])


def accuracy(logits: Tensor, y: Tensor) -> float:  # [N, classes], [N]
    """Share of rows whose largest logit is the label's."""
    return float((logits.argmax(1) == y).double().mean())


def entropy(logits: Tensor) -> Tensor:  # [N, classes] -> [N]
    """Entropy of the softmax, in nats."""
    logp = logits.double().log_softmax(1)
    return -(logp.exp() * logp).sum(1)


def membership_inference(members: Tensor, non_members: Tensor, suspects: Tensor) -> float:
    """Share of `suspects` that an attacker takes for training examples, from logits [N, classes].

    The attacker is the one of the SSD paper: a logistic regression on the entropy of the softmax, its two classes
    balanced, fitted on known members (retained training examples) and known non-members (test examples).
    """
    from sklearn.linear_model import LogisticRegression

    known = torch.cat([entropy(members), entropy(non_members)])
    is_member = torch.cat([torch.ones(len(members)), torch.zeros(len(non_members))])
    attacker = LogisticRegression(class_weight="balanced").fit(known[:, None].numpy(), is_member.numpy())
    return float(attacker.predict(entropy(suspects)[:, None].numpy()).mean())


def answer_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # [B, T, V], [B, T] -> [B], [B]
    """Arithmetic and geometric mean of the probabilities of each answer's tokens.

    The first is the P of FLAT; the second, P(answer)^(1/length), falls with any single token that became unlikely.
    Labels are aligned with the input: position t predicts label t + 1; -100 is no part of the answer.
    """
    targets = labels.roll(-1, dims=1)
    targets[:, -1] = -100
    logp = token_logprobs(logits, targets).double()
    answered = targets != -100
    count = answered.sum(1)
    return (logp.exp() * answered).sum(1) / count, (logp.sum(1) / count).exp()


def target(name: str, measured: float, limit: float, *, at_most: bool) -> dict[str, Any]:
    """One target and whether it was met."""
    met = measured <= limit if at_most else measured >= limit
    return {"name": name, "measured": measured, "limit": limit, "at_most": at_most, "met": bool(met)}
