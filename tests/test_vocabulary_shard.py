"""A vocabulary that is split over gloo ranks gives every rank the loss and gradients of the whole one."""

import functools
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from sequence_losses import IGNORE, LOSSES, hidden_inputs, leaves, linear_loss

import unlearn_fast
from unlearn_fast import VocabularyShard

SHARDED = [loss for loss in LOSSES if not loss.teacher]
V = 37
SPLITS = {2: [18, 19], 4: [10, 1, 20, 6]}  # tokens a rank
SECONDS = 120

CASES = {
    "whole sequences": {"chunk_bytes": 1 << 20},
    "chunks": {"chunk_bytes": 12 * 19 * 8},
    "pieces": {"chunk_bytes": 2 * 19 * 8},
    "softcap": {"softcap": 2.0, "temperature": 0.8},
}


def run_rank(rank: int, ranks: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=ranks)
    start = sum(SPLITS[ranks][:rank])
    own = slice(start, start + SPLITS[ranks][rank])
    shard = VocabularyShard(dist.group.WORLD, start, V)
    results = {}
    for loss in SHARDED:
        for case, options in CASES.items():
            inputs = hidden_inputs(loss)
            inputs |= {"weight": inputs["weight"][own], "bias": inputs["bias"][own]}
            results[loss.title, case] = run(loss, inputs, **options, shard=shard)
    inputs = confident()
    results["confident"] = run(LOSSES[0], inputs | {"weight": inputs["weight"][own]}, shard=shard)
    hidden, labels = torch.zeros(1, 2, 3), torch.tensor([[IGNORE, V]])
    try:
        unlearn_fast.linear_ceu_loss(hidden, labels, torch.zeros(SPLITS[ranks][rank], 3), shard=shard)
    except RuntimeError as error:
        results["label outside"] = str(error)
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def run(loss, inputs, **options):
    own = leaves(inputs)
    value = linear_loss(unlearn_fast, loss, own, **options)
    value.backward()
    return {"value": value.detach(), **{n: x.grad for n, x in own.items() if x.requires_grad}}


def confident():
    """A label whose logit is 40 above all others: 1 - p = 36 exp(-40), in float32."""
    weight = torch.zeros(V, 1)
    weight[11] = 40
    labels = torch.tensor([[IGNORE, 11, 11]])
    return {"hidden": torch.ones(1, 3, 1), "labels": labels, "weight": weight}


@functools.cache
def whole():
    results = {
        (loss.title, case): run(loss, hidden_inputs(loss), **options)
        for loss in SHARDED
        for case, options in CASES.items()
    }
    return results | {"confident": run(LOSSES[0], confident())}


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("ranks", SPLITS)
def test_every_rank_gets_the_whole(ranks, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = mp.spawn(run_rank, (ranks, port, str(tmp_path)), nprocs=ranks, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=1):  # as each rank ends, and after each second
            assert time.monotonic() < end, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    for rank in range(ranks):
        start = sum(SPLITS[ranks][:rank])
        own = slice(start, start + SPLITS[ranks][rank])
        results = torch.load(tmp_path / f"{rank}.pt")
        assert f"labels holds {V}: it must be in [0, {V})" in results.pop("label outside")
        for case, expected in whole().items():
            for name, x in expected.items():
                x = x[own] if name in ("weight", "bias") else x
                rtol = 2e-6 if case == "confident" else 1e-11
                torch.testing.assert_close(
                    results[case][name], x, rtol=rtol, atol=0 if case == "confident" else 1e-13, msg=f"{case} {name}"
                )


@pytest.mark.parametrize(
    ("start", "size", "rows"), [(-1, 10, 5), (6, 10, 5), (0, 10, 0)], ids=["before", "behind", "empty"]
)
def test_a_shard_that_does_not_fit(start, size, rows):
    shard = VocabularyShard(None, start, size)
    with pytest.raises(ValueError, match=f"shard has start {start} and size {size}, and weight has {rows} rows"):
        unlearn_fast.linear_ceu_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), torch.zeros(rows, 3), shard=shard)


def test_losses_against_a_teacher_refuse():
    loss = next(x for x in LOSSES if x.teacher)
    with pytest.raises(ValueError, match="shard must be None"):
        linear_loss(unlearn_fast, loss, hidden_inputs(loss), shard=VocabularyShard(None, 0, V))
