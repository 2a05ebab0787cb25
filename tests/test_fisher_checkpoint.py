"""A measurement that is killed goes on from its checkpoint, with the same result; any other file is refused."""

import functools
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from fisher_models import vectors
from test_fisher import fisher
from test_fisher_options import mlp

from unlearn_fast import Importance, classification_losses, output_norm_losses
from unlearn_fast.fisher.diagonal import _name


@pytest.mark.parametrize("options", [{}, {"first_moment": True}, {"target_error": 1e-9}, {"mode": "batch"}], ids=str)
def test_it_goes_on_after_a_kill_with_the_same_result(tmp_path, options):
    """The process is killed in the middle of a batch, as a machine that goes away would."""
    file = tmp_path / "state"
    script = tmp_path / "measure.py"
    script.write_text(
        textwrap.dedent(f"""
        import functools, os, sys, torch
        from torch import nn
        from unlearn_fast import classification_losses, diagonal_fisher
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 4))
        batches = [torch.randn(5, 9) for _ in range(9)]
        kill_at, seen = int(sys.argv[1]), 0
        def losses(m, b):
            global seen
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), 9)
            return classification_losses(m, b, labels="sampled")
        result = diagonal_fisher(model, batches, losses, progress=False, checkpoint=sys.argv[2], checkpoint_seconds=0,
                                 **{options!r})
        result.save(sys.argv[3])
        """)
    )

    def run(kill_at, state, result):
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, script, str(kill_at), state, tmp_path / result]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    whole = run(0, tmp_path / "other", "whole")
    assert whole.returncode == 0, whole.stderr
    assert run(6, file, "killed").returncode == -9 and file.exists()
    resumed = run(0, file, "resumed")
    assert resumed.returncode == 0, resumed.stderr
    assert not file.exists()
    a, b = Importance.load(tmp_path / "whole"), Importance.load(tmp_path / "resumed")
    assert (a.examples, a.batches) == (b.examples, b.batches) == (45, 9)
    for name in a:
        assert torch.equal(a[name], b[name]), name
    for name in a.first_moment or ():
        assert torch.equal(a.first_moment[name], b.first_moment[name])


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    class Stop(Exception):
        pass

    def stopping(batches):
        yield from batches
        raise Stop

    file = tmp_path / "state"
    batches = [vectors() for _ in range(3)]
    options = {"checkpoint": file, "checkpoint_seconds": 0}
    with pytest.raises(Stop):
        fisher(mlp(), stopping(batches[:2]), **options)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="belongs to another measurement \\(model is"):
        fisher(mlp(1), batches, **options)
    with pytest.raises(ValueError, match="belongs to another measurement \\(losses is 'classification_losses' there"):
        fisher(mlp(), batches, output_norm_losses, **options)
    frozen = mlp()
    frozen[0].bias.requires_grad_(False)
    with pytest.raises(ValueError, match="belongs to another measurement \\(parameters is"):
        fisher(frozen, batches, **options)
    with pytest.raises(
        ValueError, match="belongs to another measurement \\(mode is 'per_example' there and 'absolute'"
    ):
        fisher(mlp(), batches, mode="absolute", **options)
    with pytest.raises(ValueError, match="made from other batches"):
        fisher(mlp(), batches[::-1], **options)
    with pytest.raises(ValueError, match="holds 2 batches, and only 1 came"):
        fisher(mlp(), batches[:1], **options)
    assert file.read_bytes() == before
    file.write_bytes(before[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        fisher(mlp(), batches, **options)
    with pytest.raises(ValueError, match="its folder does not exist"):
        fisher(mlp(), batches, checkpoint=tmp_path / "none" / "state")
    importance = fisher(mlp(), [batches[0]])
    importance.save(file)
    with pytest.raises(ValueError, match="was not written by diagonal_fisher"):
        fisher(mlp(), batches, **options)


def test_losses_with_bound_arguments_have_a_name_that_lasts():
    """A function among them, or an object, is not told by its address, which the next process does not have."""

    def scorer():
        pass

    names = [_name(functools.partial(classification_losses, labels=labels)) for labels in ("all", "sampled", 3, None)]
    assert len(set(names)) == 4
    bound = functools.partial(classification_losses, scorer, labels="all", extra=object())
    assert _name(bound).endswith("scorer 'extra' object 'labels' 'all'") and "0x" not in _name(bound)


def test_a_checkpoint_of_all_batches_and_random_batches(tmp_path):
    """Killed after the last batch; and batches drawn with torch's own random numbers go on as they would have."""

    class Stop(Exception):
        pass

    def augmented(stop_at=None):
        torch.manual_seed(0)
        for i, (x, y) in enumerate(batches):
            if i == stop_at:
                raise Stop
            yield x + torch.randn(x.shape), y
        if stop_at == len(batches):
            raise Stop

    batches = [vectors() for _ in range(4)]
    expected = fisher(mlp(), augmented())
    for stop_at in (2, 4):
        options = {"checkpoint": tmp_path / "state", "checkpoint_seconds": 0}
        with pytest.raises(Stop):
            fisher(mlp(), augmented(stop_at), **options)
        ours = fisher(mlp(), augmented(), **options)
        assert all(torch.equal(ours[name], expected[name]) for name in expected)
