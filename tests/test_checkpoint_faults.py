"""Dampening on disk, disturbed: killed at any moment, interrupted, out of room, or with inputs that change."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoint_files import contents, expected_bytes, in_memory, trio, write_file, write_shards

from unlearn_fast import checkpoint
from unlearn_fast.checkpoint import blocks, journal, stream

PACKAGE = Path(checkpoint.__file__).parents[1]
BLOCK, JOURNAL = 4096, 8 * 4096
SETTINGS = {"alpha": 1.0, "lam": 0.7}
SHAPES = {"a": (100, 200), "b": (7,), "c": (300, 151), "d": (5000,)}


class Case:
    """A model in one file, or in several, and what must come out."""

    def __init__(self, folder: Path, sharded: bool) -> None:
        folder.mkdir(exist_ok=True)
        model, forget, reference = trio(SHAPES)
        if sharded:
            parts = [{name: model[name] for name in names} for names in ("ab", "c", "d")]
            self.model = write_shards(folder / "model", parts)
            (self.model / "config.json").write_text("{}")
        else:
            self.model = write_file(folder / "model", model, {"format": "pt"})
        self.forget, self.reference = write_file(folder / "f", forget), write_file(folder / "r", reference)
        self.out, self.work = folder / "out", folder / ".out.unlearn_fast"
        dampened, report = in_memory(model, forget, reference, **SETTINGS)
        files = [self.model] if self.model.is_file() else self.model.iterdir()
        self.expected = {
            str(p.relative_to(self.model)): p.read_bytes() if p.suffix == ".json" else expected_bytes(p, dampened)
            for p in files
        }
        self.counts = {name: counts[:4] for name, counts in report.parameters.items()}
        self.size = sum(map(len, self.expected.values()))
        self.inputs = (self.model, self.forget, self.reference)
        self.before = [contents(path) for path in self.inputs]

    def run(self) -> checkpoint.CheckpointReport:
        return checkpoint.dampen(*self.inputs, self.out, progress=False, **SETTINGS)

    def assert_inputs_intact(self) -> None:
        assert [contents(path) for path in self.inputs] == self.before

    def assert_absent_or_complete(self) -> bool:
        self.assert_inputs_intact()
        if os.path.lexists(self.out):
            assert contents(self.out) == self.expected
            return True
        return False

    def assert_complete(self, report: checkpoint.CheckpointReport | None = None) -> None:
        assert self.assert_absent_or_complete() and not self.work.exists()
        if report is not None:
            assert {name: counts[:4] for name, counts in report.parameters.items()} == self.counts

    def remove_output(self) -> None:
        for path in (self.out, self.work):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.fixture(params=[False, True], ids=["file", "directory"])
def case(request, tmp_path, monkeypatch) -> Case:
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)
    monkeypatch.setattr(stream, "JOURNAL", JOURNAL)
    return Case(tmp_path, request.param)


class Forks:
    def __init__(self) -> None:
        script = Path(__file__).with_name("checkpoint_forks.py")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACKAGE.parent)}
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(BLOCK), str(JOURNAL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._line() == "ready\n"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def start(self, case: Case, **options: int) -> int:
        assert self.process.stdin is not None
        run = {"paths": [*map(str, case.inputs), str(case.out)], "settings": SETTINGS, **options}
        self.process.stdin.write(json.dumps(run) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> tuple[int, str]:
        status, error = json.loads(self._line())
        return status, error

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    started = Forks()
    yield started
    started.close()


def test_killed_at_any_moment(case, forks):
    """25 kills here and 25 there, spread over whole runs; every second output is killed twice before it is finished."""
    started = time.perf_counter()
    forks.start(case)
    assert forks.wait() == (0, "")
    whole = time.perf_counter() - started
    case.assert_complete()
    generator = random.Random(0)
    kills = resumed = 0
    while kills < 25:
        case.remove_output()
        for _ in range(1 + kills % 2):
            pid = forks.start(case)
            time.sleep(generator.uniform(0, whole))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            status, _ = forks.wait()
            kills += status == signal.SIGKILL
            if case.assert_absent_or_complete():
                break
            resumed += (case.work / "journal.json").exists()
        else:
            forks.start(case)
            assert forks.wait() == (0, "")
            case.assert_complete()
    assert resumed >= 5


def stop_after(monkeypatch, limit: int, error: BaseException, *, keep: bool) -> list[tuple[int, int]]:
    """Lets `limit` bytes be written, then fails; returns where writes went. Without `keep` it is as if killed."""
    writes: list[tuple[int, int]] = []
    write = blocks._write

    def counted(file, buffer, position):
        if sum(n for _, n in writes) >= limit:
            raise error
        writes.append((position, len(buffer)))
        write(file, buffer, position)

    monkeypatch.setattr(blocks, "_write", counted)
    if not keep:
        monkeypatch.setattr(stream.Stream, "_keep", lambda *_: None)
    return writes


@pytest.mark.parametrize("keep", [False, True], ids=["killed", "interrupted"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_restart_goes_on_where_it_stopped(case, monkeypatch, keep, share):
    with monkeypatch.context() as patch:
        stop_after(patch, int(share * case.size), KeyboardInterrupt(), keep=keep)
        with pytest.raises(KeyboardInterrupt):
            case.run()
    assert not case.assert_absent_or_complete()
    done = 0
    if (case.work / "journal.json").exists():
        record = json.loads((case.work / "journal.json").read_text())
        names = sorted(case.expected, key=lambda name: (name.endswith(".json"), name))
        done = sum(len(case.expected[name]) for name in names[: record["job"]]) + record["position"]
    # One segment may be under way, another be waiting for its entry, and of a third some blocks.
    assert done >= share * case.size - (2 * BLOCK if keep else 3 * JOURNAL)
    writes = stop_after(monkeypatch, 10**9, KeyboardInterrupt(), keep=keep)
    report = case.run()
    assert sum(n for _, n in writes) == case.size - done
    case.assert_complete(report)


@pytest.mark.parametrize(
    ("change", "fresh"),
    [
        (lambda case: None, False),
        (lambda case: os.utime(case.forget, ns=(0, 0)), True),
        (lambda case: SETTINGS.update(alpha=1.0 + 2**-50), True),
        (lambda case: (case.work / "journal.json").write_text("{"), True),
        (lambda case: (case.work / "journal.json").unlink(), True),
        (
            lambda case: shutil.rmtree(case.work / "data") if case.model.is_dir() else (case.work / "data").unlink(),
            True,
        ),
        (lambda case: shutil.rmtree(case.work), True),
    ],
    ids=["nothing", "input", "setting", "damaged journal", "no journal", "no data", "no folder"],
)
def test_whatever_else_has_changed_starts_afresh(case, monkeypatch, change, fresh):
    monkeypatch.setitem(SETTINGS, "alpha", 1.0)  # and afterwards what it was
    with monkeypatch.context() as patch:
        stop_after(patch, case.size // 2, KeyboardInterrupt(), keep=True)
        with pytest.raises(KeyboardInterrupt):
            case.run()
    change(case)
    writes = stop_after(monkeypatch, 10**9, KeyboardInterrupt(), keep=True)
    report = case.run()
    assert (sum(n for _, n in writes) == case.size) == fresh
    case.assert_complete(report)


def test_a_second_run_at_the_same_time_is_refused(case, monkeypatch):
    refusals = []
    tell = stream.Stream._tell

    def second(self, progress):
        with pytest.raises(FileExistsError, match="another run is writing") as refused:
            case.run()
        refusals.append(refused)
        tell(self, progress)

    monkeypatch.setattr(stream.Stream, "_tell", second)
    case.assert_complete(case.run())
    assert refusals


def test_an_output_that_appears_meanwhile_is_kept(case, monkeypatch):
    publish = journal.Workspace.publish

    def late(self):
        case.out.write_text("of another program")
        publish(self)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Workspace, "publish", late)
        with pytest.raises(FileExistsError, match="has appeared: move it away, and run the same command again"):
            case.run()
    assert case.out.read_text() == "of another program"
    case.out.unlink()
    writes = stop_after(monkeypatch, 0, KeyboardInterrupt(), keep=True)
    case.assert_complete(case.run())
    assert not writes


def test_what_a_kill_after_the_rename_leaves_is_swept_away(case, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        case.run()
    assert (case.work / "journal.json").exists()
    with pytest.raises(FileExistsError, match="exists: nothing is overwritten"):
        case.run()
    case.assert_complete()


def test_an_input_that_changes_meanwhile(case, monkeypatch):
    read = blocks._read

    def touched(file, buffer, position):
        os.utime(case.reference, ns=(0, 0))
        read(file, buffer, position)

    monkeypatch.setattr(blocks, "_read", touched)
    with pytest.raises(OSError, match="an input changed while it was read"):
        case.run()
    assert not case.assert_absent_or_complete()


def test_an_input_that_is_cut_off_meanwhile(case, monkeypatch):
    within = blocks.blocks_within

    def cut(*arguments):
        os.truncate(case.forget, case.forget.stat().st_size - 1000)
        return within(*arguments)

    monkeypatch.setattr(checkpoint, "blocks_within", cut)
    with pytest.raises(OSError, match="an input became shorter while it was read"):
        case.run()
    assert not case.out.exists()


FULL = "cannot grow (.*); the model is as it was, and what was done stays there: make room, and run the same command"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("journal_fails", [False, True])
def test_a_full_disk(case, monkeypatch, code, journal_fails):
    with monkeypatch.context() as patch:
        stop_after(patch, case.size // 2, OSError(code, os.strerror(code)), keep=True)
        if journal_fails:
            patch.setattr(stream.Stream, "_tell", lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
        with pytest.raises(OSError, match=FULL) as full:
            case.run()
    assert full.value.errno == errno.ENOSPC and os.strerror(code) in str(full.value)
    assert not case.assert_absent_or_complete()
    writes = stop_after(monkeypatch, 10**9, KeyboardInterrupt(), keep=True)
    case.assert_complete(case.run())
    assert (sum(n for _, n in writes) < 0.6 * case.size) == (not journal_fails)


def test_a_limit_of_the_file_size(case, forks):
    limit = max(map(len, case.expected.values())) // 2
    forks.start(case, file_size_limit=limit)
    status, error = forks.wait()
    assert status != 0 and error.startswith("OSError: out: ") and "cannot grow (File too large)" in error
    assert not case.assert_absent_or_complete() and (case.work / "journal.json").exists()
    forks.start(case)
    assert forks.wait() == (0, "")
    case.assert_complete()


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A file system of 200 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(case, tiny_disk, monkeypatch):
    case.out, case.work = tiny_disk / "out", tiny_disk / ".out.unlearn_fast"
    with pytest.raises(OSError, match="bytes are needed on the disk of"):
        case.run()
    assert not list(tiny_disk.iterdir())
    with monkeypatch.context() as patch:  # another program fills it while this one runs
        patch.setattr(checkpoint, "_check_room", lambda *_: None)
        with pytest.raises(OSError, match=FULL):
            case.run()
    assert not case.assert_absent_or_complete()
    assert (case.work / "journal.json").exists()
    subprocess.run(["mount", "-o", "remount,size=2m", str(tiny_disk)], check=True)
    writes = stop_after(monkeypatch, 10**9, KeyboardInterrupt(), keep=True)
    case.assert_complete(case.run())
    assert sum(n for _, n in writes) < case.size
