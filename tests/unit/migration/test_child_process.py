"""A child process that ends with its parent, for which the child need not run."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from migration.child_process import end_with_parent, spawned_pool
from tests.environment import START_ENVIRONMENT


def child(ready: Connection) -> None:
    end_with_parent()
    ready.send(os.getpid())
    time.sleep(600)


def start_child() -> int:
    """Starts a child in this thread, and stops it. Returns its process id."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,), daemon=True)
    process.start()
    assert process.pid is not None
    assert ours.recv() == process.pid
    os.kill(process.pid, signal.SIGSTOP)
    return process.pid


def start_in_pool() -> int:
    """Starts a long task in a pool. Returns its process id."""
    pool = spawned_pool(1)
    process_id = pool.submit(os.getpid).result()
    pool.submit(time.sleep, 600)
    return process_id


@pytest.mark.parametrize("end", ["killed", "thread", "killed with a pool"])
def test_a_child_ends_with_its_parent(end: str) -> None:
    """The parent is killed, or goes on without the thread that has started the child, which is stopped."""
    root = str(Path(__file__).parents[3])
    parent = subprocess.Popen(
        [sys.executable, __file__, end],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**START_ENVIRONMENT, "PYTHONPATH": root},
    )
    try:
        assert parent.stdout is not None
        started = psutil.Process(int(parent.stdout.readline()))
        if end.startswith("killed"):
            parent.kill()
        else:
            parent.communicate("\n", timeout=60)
        assert not psutil.wait_procs([started], timeout=60)[1]
    finally:
        parent.kill()
        parent.communicate()


if __name__ == "__main__":
    may_end = threading.Event()

    def start() -> None:
        print(start_in_pool() if "pool" in sys.argv[1] else start_child(), flush=True)
        may_end.wait()

    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    sys.stdin.readline()
    may_end.set()
    thread.join()
    time.sleep(600 if sys.argv[1].startswith("killed") else 1)
