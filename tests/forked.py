"""Kernels forked from a process that has loaded everything (tests/clumsy.py), instead of loading torch each by itself."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from clumsy import fork_server


def kernel(words: list[str], env: dict[str, str], cwd: str) -> None:
    """What `python -m ipykernel_launcher` does: it serves until it is told to end, or its parent is gone."""
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    from ipykernel.kernelapp import IPKernelApp

    sys.argv = words
    IPKernelApp.launch_instance(argv=[*words[3:], f"--IPKernelApp.parent_handle={os.getppid()}"])


class Forked:
    """A process of the fork server, as jupyter_client looks at a Popen."""

    stdin = stdout = stderr = None

    def __init__(self, words: list[str], env: dict[str, str], cwd: str | None):
        self.process = fork_server().Process(target=kernel, args=(words, env, str(cwd or os.getcwd())))
        self.process.start()
        self.pid = self.process.pid
        while self.poll() is None and os.getpgid(self.pid) != self.pid:  # signals go to its group
            time.sleep(0.001)

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("kernel", timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@contextmanager
def forked() -> Iterator[None]:
    """Kernels that this process starts are forked."""

    def launched(words: list[str], env: dict[str, str] | None = None, cwd: str | None = None, **_: object) -> Forked:
        return Forked(words, dict(os.environ if env is None else env), cwd)

    with patch("jupyter_client.provisioning.local_provisioner.launch_kernel", launched):
        yield
