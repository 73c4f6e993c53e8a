"""A process that has imported what every worker needs, and is forked for each of them: imports are paid once.

It computes nothing, so that it has one thread and no device, and what is forked is as good as a process of its own that
was started: all that a worker does and holds is its own. What was imported is in the memory of each, and counts there.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""Read when torch and numpy are imported."""
NO_DRIVER = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Libraries ask for GPUs when they are imported; so torch's answer leaves the driver alone, which no fork could use."""
ALIVE, GONE = "alive", "gone"
"""Answers beside an exit status: of a worker that has none yet, and of one that is not known or no more."""


class Nursery:
    """The side that asks, from any thread. The process is started by the first thing that is asked.

    Args:
        preload: the module that is imported before anything is forked.
        serve: `module:function`, which is what a worker does with its pipe.
        threads: of every worker.
    """

    def __init__(self, preload: str, serve: str, threads: int) -> None:
        self.preload, self.serve, self.threads = preload, serve, threads
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.line, self.theirs = socket.socketpair()

    @property
    def pids(self) -> list[int]:
        return [self.process.pid] if self.process else []

    def _start(self) -> None:
        with self.theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self.theirs.fileno()), self.preload, self.serve],
                cwd=ROOT if __name__.startswith("benchmarks.") else None, pass_fds=[self.theirs.fileno()],
                env=os.environ | dict.fromkeys(THREAD_VARIABLES, str(self.threads)) | NO_DRIVER,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip

    def fork(self, log: Path) -> tuple[int, Connection]:
        """A worker, which writes what it says into `log`: its process id, and the pipe to it."""
        ours, theirs = Pipe()
        with theirs:
            return int(self._ask(f"fork {log}", theirs.fileno())), ours

    def wait(self, pid: int, seconds: float) -> str:
        """The exit status of a worker, negative for a signal; ALIVE where it has not ended by then."""
        end = time.monotonic() + seconds
        try:
            while (status := self._ask(f"status {pid}")) == ALIVE and time.monotonic() < end:
                time.sleep(0.01)
        except OSError:
            return GONE
        return status

    def _ask(self, text: str, *descriptors: int) -> str:
        """Raises OSError where the nursery has ended."""
        with self.lock:
            if self.process is None:
                self._start()
            assert self.process is not None
            answer = b""
            with contextlib.suppress(ConnectionError):
                socket.send_fds(self.line, [text.encode()], descriptors)
                answer = self.line.recv(64)
            if not answer:
                raise OSError(f"the process that workers are forked from has ended with status {self.process.wait()}")
        return answer.decode()

    def close(self) -> None:
        self.line.close()
        self.theirs.close()
        if self.process:
            self.process.wait()


# ---- in the nursery


def listen(line: socket.socket, serve: str) -> None:
    """Fork a worker or tell a status, until the other side hangs up. In a worker, serve and come back."""
    while True:
        text, descriptors, *_ = socket.recv_fds(line, 4096, 1)
        word, _, given = text.decode().partition(" ")
        if word == "fork":
            pid = os.fork()
            if not pid:
                line.close()
                return become(serve, Path(given), descriptors[0])
            os.close(descriptors[0])
            answer = str(pid)
        elif word == "status":
            answer = status(int(given))
        else:
            return
        line.sendall(answer.encode())


def become(serve: str, log: Path, pipe: int) -> None:
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    module, name = serve.split(":")
    getattr(importlib.import_module(module), name)(Connection(pipe))
    # What is registered for the end is done, as removing temporary folders; to take apart all that the nursery imported
    # takes a second per worker, and is of no use.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def status(pid: int) -> str:
    try:
        ended, code = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return GONE
    return str(os.waitstatus_to_exitcode(code)) if ended else ALIVE


if __name__ == "__main__":
    number, preload, served = sys.argv[1:]
    with contextlib.suppress(ImportError):  # whoever needs it will say so
        importlib.import_module(preload)
    gc.freeze()  # no worker looks through, and so copies, what was imported
    listen(socket.socket(fileno=int(number)), served)
