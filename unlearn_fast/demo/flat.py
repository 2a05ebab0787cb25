"""FLAT on a small causal language model that knows made-up authors: some of them are forgotten from their own data."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from unlearn_fast import flat_loss
from unlearn_fast.demo.authors import Pair, Words, make_world, template
from unlearn_fast.demo.evaluation import answer_probabilities, target


@dataclass(frozen=True)
class Settings:
    """Chosen on seeds 1 to 7; shown is seed 0.

    Tried: width 128 to 512 and 1 to 3 layers; 20 to 100 epochs; learning rate of the training 1e-3 to 3e-3, of FLAT
    1e-6 to 3e-3 with AdamW, also SGD; kl and total_variation; 0 to 40 strangers; one or both phrasings. What mattered:
    a wide, shallow model, a small learning rate for FLAT, and stopping in time, because FLAT never sees the other
    authors and in the end silences them. At width 384, 60 epochs, the retain answers kept 77 % (seed 5) to 99 % (seed
    2) at 5e-6, and 81 % to 98 % at 2e-6; these settings kept 94 %, 98 % and 99 % on seeds 1, 3 and 5. The last tenths
    of P are the end token, which follows every answer alike and so is unlearned for all at once.
    """

    hidden: int = 512
    layers: int = 1
    authors: int = 20
    forget: int = 2
    strangers: int = 4
    epochs: int = 90
    lr: float = 1e-3
    flat_steps: int = 2000  # at most
    flat_lr: float = 2e-6
    stop_below: float = 0.1  # of the first P
    divergence: str = "total_variation"
    seed: int = 0
    batch: int = 48


QUICK = Settings(hidden=256, authors=8, strangers=2, epochs=80, flat_lr=1.5e-5)


def run(settings: Settings, show_progress: bool = True) -> dict[str, Any]:
    """Trains, forgets, measures. Changes the global random state: `demo.main` forks it."""
    torch.manual_seed(settings.seed)
    words = Words()
    world = make_world(settings.seed, authors=settings.authors, forget=settings.forget, strangers=settings.strangers)
    model = make_model(settings, words)

    start = time.perf_counter()
    train(model, words, world.train, settings, show_progress)
    trained = time.perf_counter()
    # FLAT sees one phrasing of each question; the other measures whether the fact is gone or only the question.
    shown = tuple(pair for pair in world.forget if pair.phrasing == 0)
    reworded = tuple(pair for pair in world.forget if pair.phrasing == 1)
    sets = {
        "forget": answers(shown),
        "forget, reworded": answers(reworded),
        "template": templates(shown),
        "template, reworded": templates(reworded),
        "retain": answers(world.retain),
    }
    asked = {"forget": shown[0], "forget, reworded": reworded[0], "retain": world.retain[0]}

    def measure() -> tuple[dict[str, Any], dict[str, str]]:
        # The same random numbers before and after, so that a different sample comes from a different model.
        generator = torch.Generator().manual_seed(settings.seed)
        probabilities = {name: probability(model, words, *texts) for name, texts in sets.items()}
        return probabilities, {name: sample(model, words, pair.question, generator) for name, pair in asked.items()}

    before, said_before = measure()
    forgetting = time.perf_counter()
    steps = forget(model, words, shown, settings, show_progress)
    forgotten = time.perf_counter()
    after, said_after = measure()
    return {
        "settings": asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "pairs": {"forget": len(world.forget), "retain": len(world.retain), "strangers": len(world.strangers)},
        "steps": steps,
        "before": before,
        "after": after,
        "samples": {
            name: {
                "question": pair.question,
                "truth": pair.answer,
                "before": said_before[name],
                "after": said_after[name],
            }
            for name, pair in asked.items()
        },
        "seconds": {"training": trained - start, "forgetting": forgotten - forgetting},
        "targets": [
            # Each in the mean that is worse off.
            target(
                "probability of forget answers, left of before",
                max(kept(before["forget"], after["forget"])),
                0.1,
                at_most=True,
            ),
            target(
                "probability of retain answers, left of before",
                min(kept(before["retain"], after["retain"])),
                0.8,
                at_most=False,
            ),
        ],
    }


def make_model(settings: Settings, words: Words) -> nn.Module:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=settings.hidden,
            intermediate_size=2 * settings.hidden,
            num_hidden_layers=settings.layers,
            num_attention_heads=4,
            max_position_embeddings=64,
            pad_token_id=Words.PAD,
            bos_token_id=Words.BEGIN,
            eos_token_id=Words.END,
        )
    )


def train(model: nn.Module, words: Words, pairs: tuple[Pair, ...], settings: Settings, show_progress: bool) -> None:
    """Ordinary fine-tuning on the answers."""
    ids, labels = words.batch(*answers(pairs))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    steps = settings.epochs * -(-len(pairs) // settings.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc="training", unit="step", disable=not show_progress, leave=False) as bar:
        for _ in range(settings.epochs):
            for rows in torch.randperm(len(pairs)).split(settings.batch):
                optimizer.zero_grad()
                model(input_ids=ids[rows], labels=labels[rows], use_cache=False).loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()


def forget(model: nn.Module, words: Words, pairs: tuple[Pair, ...], settings: Settings, show_progress: bool) -> int:
    """FLAT: nothing but the questions to forget, each with its answer and with a template answer. Returns the steps.

    It stops on what FLAT itself may see: when P, the mean probability of a forget answer's tokens, has fallen to
    `stop_below` of its start.
    """
    optimizer = torch.optim.AdamW(model.parameters(), settings.flat_lr, weight_decay=0.01)
    questions, truths = answers(pairs)
    forget_ids, forget_labels = words.batch(questions, truths)
    model.train()
    first = None
    for step in tqdm(range(settings.flat_steps), desc="FLAT", unit="step", disable=not show_progress, leave=False):
        turns = [template(step + number) for number in range(len(pairs))]
        template_ids, template_labels = words.batch(questions, turns)
        forget_logits = model(input_ids=forget_ids, use_cache=False).logits
        now = float(answer_probabilities(forget_logits.detach(), forget_labels)[0].mean())
        first = now if first is None else first
        if now < settings.stop_below * first:
            return step
        optimizer.zero_grad()
        flat_loss(
            model(input_ids=template_ids, use_cache=False).logits,
            template_labels,
            forget_logits,
            forget_labels,
            divergence=settings.divergence,
        ).backward()
        optimizer.step()
    return settings.flat_steps


def answers(pairs: tuple[Pair, ...]) -> tuple[list[str], list[str]]:
    """Questions and their own answers."""
    return [pair.question for pair in pairs], [pair.answer for pair in pairs]


def templates(pairs: tuple[Pair, ...]) -> tuple[list[str], list[str]]:
    """Questions and template answers."""
    return [pair.question for pair in pairs], [template(number) for number in range(len(pairs))]


@torch.no_grad()
def probability(model: nn.Module, words: Words, questions: list[str], texts: list[str]) -> dict[str, float]:
    """Mean over the questions of the two means that `answer_probabilities` defines."""
    model.eval()
    ids, labels = words.batch(questions, texts)
    mean, geometric = answer_probabilities(model(input_ids=ids, use_cache=False).logits, labels)
    return {"mean": float(mean.mean()), "geometric": float(geometric.mean())}


@torch.no_grad()
def sample(model: nn.Module, words: Words, question: str, generator: torch.Generator, limit: int = 16) -> str:
    """An answer drawn word by word at temperature 1."""
    model.eval()
    prompt = words.prompt(question)
    ids = list(prompt)
    while len(ids) < len(prompt) + limit:
        logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
        if ids[-1] == Words.END:
            break
    return words.decode(ids[len(prompt) :])


def kept(before: dict[str, float], after: dict[str, float]) -> list[float]:
    """After over before, in both means."""
    return [after[kind] / before[kind] for kind in ("mean", "geometric")]
