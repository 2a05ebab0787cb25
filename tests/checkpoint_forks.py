"""Starts runs of `checkpoint.dampen` at once, for tests that kill them: forks of a process that has imported torch.

Each line of JSON on stdin is a run, answered by the child's process id and then, when it has ended, by its wait status
and its error.
"""

import json
import os
import resource
import sys
from pathlib import Path

from unlearn_fast import checkpoint
from unlearn_fast.checkpoint import blocks, stream


def child(run: dict, tell: int) -> None:
    if limit := run.get("file_size_limit"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        checkpoint.dampen(*run["paths"], progress=False, **run["settings"])
    except Exception as error:
        os.write(tell, f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}".encode())
        os._exit(1)
    os._exit(0)


def main() -> None:
    blocks.BLOCK, stream.JOURNAL = map(int, sys.argv[1:])
    print("ready", flush=True)
    for line in sys.stdin:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(json.loads(line), write)
        os.close(write)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps([status, Path(f"/dev/fd/{read}").read_text()]), flush=True)
        os.close(read)


if __name__ == "__main__":
    main()
