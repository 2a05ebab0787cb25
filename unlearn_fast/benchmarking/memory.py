"""Peak memory of one run, measured in a process of its own: what it touches beyond its inputs, scratch included.

Right to within some 100 KiB, since the system counts pages in batches.
"""

import ctypes
import multiprocessing
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from unlearn_fast.benchmarking.case import Case, make_inputs

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_M_MMAP_THRESHOLD = -3  # glibc's


def peak_bytes(make_case: Callable[[], Case], entrant: str) -> int | None:
    """Of the named implementation in the case that `make_case` makes over there, so that it must be picklable.

    None where the system does not tell (it is not Linux).
    """
    if not _CLEAR_REFS.exists():
        return None
    # The fork server has imported torch and run nothing: its children start at once and share no thread pool with us.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "unlearn_fast.benchmarking.cases", "torch._inductor.compile_fx"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, make_case, entrant, torch.get_num_threads()), daemon=False)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:  # the process died: out of memory, most likely
        return None
    finally:
        process.join()


def _measure(sender: Connection, make_case: Callable[[], Case], entrant_name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # the check has heard them
    # A fixed threshold: otherwise the allocator keeps large freed blocks as it likes, and the peak varies by as much.
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(_M_MMAP_THRESHOLD, 128 << 10)
    case = make_case()
    entrant = next(e for e in case.entrants() if e.name == entrant_name)
    inputs = make_inputs(case)
    entrant.run(case.warm_up(inputs))
    prepared = case.fresh(inputs)
    ctypes.CDLL(None).malloc_trim(0)  # freed memory must not serve the run unseen
    _CLEAR_REFS.write_text("5")  # sets the peak back to the present
    before = _resident("VmRSS")
    results = entrant.run(prepared)
    sender.send(_resident("VmHWM") - before)
    del results


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
