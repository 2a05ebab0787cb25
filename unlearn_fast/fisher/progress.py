"""A progress bar over examples: how many a second, and how much time remains."""

from collections.abc import Iterable, Iterator
from typing import Any

from unlearn_fast.fisher.batches import batch_size


def with_progress(batches: Iterable[Any], show: bool, description: str) -> Iterator[tuple[Any, int]]:
    """The batches that hold examples, each with how many. The bar knows the remaining time where it knows the number of
    batches."""
    if not show:
        for batch in batches:
            if n := batch_size(batch):
                yield batch, n
        return
    from tqdm.auto import tqdm

    with tqdm(desc=description, unit=" examples", leave=False) as bar:
        for batch in batches:
            n = batch_size(batch)
            if bar.total is None and n and (total := _total(batches, n)):
                bar.reset(total)
            if n:
                yield batch, n
            bar.update(n)


def _total(batches: Any, n: int) -> int | None:
    """Batches of n each, as far as there are that many examples."""
    try:
        most = len(batches) * n
    except TypeError:  # a generator, or a loader of a stream
        return None
    dataset: Any = getattr(batches, "dataset", None)
    return min(most, len(dataset)) if hasattr(dataset, "__len__") else most
