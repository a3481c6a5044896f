r"""Whether the last ``\boxed{…}`` of a response equals the known answer, as math-verify judges it.

math-verify stops itself with an alarm signal, which works in the main thread only and does not interrupt one long operation of a big
integer (``9^{9^{9^9}}``). So it runs in a child process with its alarms off; the parent waits for each verdict, and replaces the child
when none comes in time: that answer is wrong. Any thread may ask. A pair takes some milliseconds, the first one a second more.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tbrm_theory.errors import InvalidInputError
from tbrm_theory.llm.tasks import Reward, response_text

__all__ = ["BoxedVerifier", "boxed_answer", "math_reward"]

_WORKER = Path(__file__).with_name("boxed_worker.py")
_LONGEST = 300
_START_SECONDS = 60.0


def boxed_answer(response: str) -> str | None:
    r"""What stands in the last ``\boxed{…}``, brackets balanced; ``None`` without one."""
    _, opening, rest = response.rpartition("\\boxed{")
    depth = 1
    for end, character in enumerate(rest if opening else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:end].strip() or None
    return None


class BoxedVerifier:
    """The child process, started when first asked; use it as a context, or call :meth:`close`."""

    def __init__(self, seconds: float = 5.0) -> None:
        if not seconds > 0:
            raise InvalidInputError("seconds", f"expected a positive number, found {seconds}")
        self.seconds = seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def equal(self, known: str, answer: str) -> bool:
        """Whether two answers in LaTeX are equal; the order matters little (``x=3`` answers ``3``)."""
        if len(answer) > _LONGEST:
            return False
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            child.stdin.write(json.dumps([known, answer]).encode() + b"\n")
            child.stdin.flush()
            verdict = self._line(child, self.seconds)
            if verdict is None:
                self._stop()
            return verdict == b"true"

    def right(self, known: str, response: str) -> bool:
        """Whether the last boxed expression of a response equals the known answer."""
        answer = boxed_answer(response)
        return answer is not None and self.equal(known, answer)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            command = [sys.executable, "-P", str(_WORKER)]
            self._child = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            if self._line(self._child, _START_SECONDS) != b"ready":
                self._stop()
                raise RuntimeError("math-verify did not start; is the extra `llm` installed?")
        return self._child

    @staticmethod
    def _line(child: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The child's next line; ``None`` if none comes in time, or it died."""
        assert child.stdout is not None
        end, line = time.monotonic() + seconds, b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([child.stdout], [], [], max(0.0, end - time.monotonic()))
            part = os.read(child.stdout.fileno(), 64) if ready else b""
            if not part:
                return None
            line += part
        return line.strip()

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                pipe.close()
            self._child.wait()
            self._child = None

    def close(self) -> None:
        with self._lock:
            self._stop()

    def __enter__(self) -> BoxedVerifier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def math_reward(verifier: BoxedVerifier) -> Reward:
    """The reward of problems with a boxed answer in TRL's convention; it reads the column ``answer``."""

    def right_boxed_answer(
        prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[str], **_: Any
    ) -> list[float]:
        pairs = zip(completions, answer, strict=True)
        return [float(verifier.right(known, response_text(text))) for text, known in pairs]

    return right_boxed_answer
