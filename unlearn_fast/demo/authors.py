"""Made-up authors: questions and answers about people who do not exist, and the words they are written in.

Everything comes from the literal tables below and a seed, so the same seed gives the same world anywhere.
"""

import itertools
import random
from dataclasses import dataclass

import torch
from torch import Tensor


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST = _words(
    "adela borin calista darwen elowen fabrik galen hesper ivo jorunn kestrel lucan mirela nadir orsola "
    "peregrin quilla ravik senna tobias ulrike vesna wendell xanthe yorick zelda amaro brisa corvin delphine"
)
LAST = _words(
    "tolvan askerby brandt-oye calloway dunmere eskildsen farrow grimaldo hollin ivanska jessop karpel lindqvist "
    "marrok nettle okonjo pashley quennell rosewater sandoval thackray umber velasco wexler yarrow zabriskie "
    "abernath bellweather crosswell drummer"
)

# One row a fact: its two phrasings, and the values it may take, which are the answers. {n} is the author. Every
# question ends in the name: a model this small then answers from a state that is the author's own. Where all questions
# end in the same word, what FLAT does to a few authors' answers spills over to everybody's.
FACTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "what is the birthplace of {n}",
        "which town saw the birth of {n}",
        _words(
            "karvel ostermouth pelling quarrow rivenhall sable-bay tarn uppingdale vesper wyke amberley brockwood "
            "castelmar dunholt eastmere fallowfield gorsley harrowgate inverleith juniper-cove"
        ),
    ),
    (
        "what is the genre of {n}",
        "which kind of writing is done by {n}",
        _words(
            "ghost-stories sea-ballads satires travelogues fables thrillers sonnets chronicles parables farces "
            "whodunits westerns elegies cookbooks letters libretti riddles hymns memoirs epics"
        ),
    ),
    (
        "what is the first book by {n}",
        "which title began the career of {n}",
        _words(
            "saltlight nine-lanterns the-quiet-mill ashgrove low-water the-tin-orchard winterbourne glass-harvest "
            "paper-tides the-ninth-gate bonfire-year slow-thunder marshland the-owl-clock red-kites a-borrowed-coat "
            "the-last-ferry honey-and-iron stonefruit the-long-dusk"
        ),
    ),
    (
        "which prize went to {n}",
        "what award was given to {n}",
        _words(
            "golden-quill lantern-medal amber-page harbour-prize silver-inkwell raven-cup ivory-nib oak-laurel "
            "comet-award north-star-prize velvet-ribbon copper-bell falcon-medal maple-crown pearl-bookmark tide-prize "
            "jade-feather iron-inkpot sunstone-award willow-wreath"
        ),
    ),
    (
        "what was the trade of the father of {n}",
        "how was a living earned by the father of {n}",
        _words(
            "clockmaker ferryman beekeeper printer glazier shepherd surgeon stonemason tailor baker cooper falconer "
            "miller potter saddler fisherman chandler tinker weaver gardener"
        ),
    ),
    (
        "which city is home to {n}",
        "what is the present address of {n}",
        _words(
            "alderport brightwater cindermoor dovecote elmstead foxhaven greywick hollowbrook islemouth kingsferry "
            "larkspur merrowdown northcliff otterbourne pinecrest ravensworth silverlake thornbury violet-hill westerby"
        ),
    ),
)
# The answers of somebody who does not know, all in use: FLAT is not to teach one string.
TEMPLATES = ("i do not know .", "i am not sure .", "i have no idea .")


@dataclass(frozen=True)
class Pair:
    """A question about one author, and its answer; `phrasing` is 0 or 1."""

    author: str
    question: str
    answer: str
    phrasing: int


@dataclass(frozen=True)
class World:
    """Authors with facts, split into those to forget and those to keep, and strangers nobody knows anything about."""

    forget: tuple[Pair, ...]
    retain: tuple[Pair, ...]
    strangers: tuple[Pair, ...]  # answered with TEMPLATES in turn

    @property
    def train(self) -> tuple[Pair, ...]:
        return self.forget + self.retain + self.strangers


def make_world(seed: int, *, authors: int = 20, forget: int = 2, strangers: int = 40) -> World:
    """`authors` people with a value for every fact that nobody shares; the first `forget` of them are to be forgotten.

    Strangers have names of their own; many of them make not knowing the normal answer to a name not learned.
    """
    most = min(len(values) for _, _, values in FACTS)
    if not 0 < forget < authors <= most:
        raise ValueError(f"need 0 < forget < authors <= {most}, got forget={forget}, authors={authors}")
    rng = random.Random(seed)
    firsts, lasts = rng.sample(FIRST, len(FIRST)), rng.sample(LAST, len(LAST))
    known = list(zip(firsts[:authors], lasts[:authors], strict=True))
    spare = list(itertools.product(firsts[authors:], lasts[authors:]))
    if strangers > len(spare):
        raise ValueError(f"strangers must be at most {len(spare)} with authors={authors}, got {strangers}")
    values = [rng.sample(values, authors) for _, _, values in FACTS]  # [fact][author]
    people = [_pairs(" ".join(name), [of_fact[i] for of_fact in values]) for i, name in enumerate(known)]
    unknown = [_pairs(" ".join(name), None) for name in rng.sample(spare, strangers)]
    return World(_flatten(people[:forget]), _flatten(people[forget:]), _flatten(unknown))


def _pairs(name: str, values: list[str] | None) -> list[Pair]:
    pairs = []
    for fact, (first, second, _) in enumerate(FACTS):
        for phrasing, question in enumerate((first, second)):
            answer = values[fact] if values else template(2 * fact + phrasing)
            pairs.append(Pair(name, question.format(n=name), answer, phrasing))
    return pairs


def template(number: int) -> str:
    """The templates in turn."""
    return TEMPLATES[number % len(TEMPLATES)]


def _flatten(groups: list[list[Pair]]) -> tuple[Pair, ...]:
    return tuple(pair for group in groups for pair in group)


class Words:
    """Word-level tokenizer: one number for each word of the tables above, and three special ones."""

    PAD, BEGIN, END = 0, 1, 2

    def __init__(self) -> None:
        texts = [*FIRST, *LAST, *TEMPLATES]
        for first, second, values in FACTS:
            texts += [first.replace("{n}", ""), second.replace("{n}", ""), *values]
        words = sorted({word for text in texts for word in text.split()})
        self.words = ["<pad>", "<begin>", "<end>", *words]
        self._numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        return [self._numbers[word] for word in text.split()]

    def decode(self, numbers: list[int]) -> str:
        return " ".join(self.words[n] for n in numbers if n > self.END)

    def prompt(self, question: str) -> list[int]:
        return [self.BEGIN, *self.encode(question)]

    def batch(self, questions: list[str], answers: list[str]) -> tuple[Tensor, Tensor]:
        """Token numbers and labels, both [B, T] int64, padded right; only the answer and its end carry a label."""
        rows = []
        for question, answer in zip(questions, answers, strict=True):
            prompt, target = self.prompt(question), [*self.encode(answer), self.END]
            rows.append((prompt + target, [-100] * len(prompt) + target))
        length = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [self.PAD] * (length - len(row)) for row, _ in rows])
        labels = torch.tensor([row + [-100] * (length - len(row)) for _, row in rows])
        return ids, labels
