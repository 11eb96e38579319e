"""Calls that may end their process, each made in one of its own."""

from __future__ import annotations

import os
import resource
import signal
import traceback
from collections.abc import Callable

RETURNED, RAISED = 10, 11
_SECONDS = 60
_MEMORY = 16 << 30


def outcome(call: Callable[[], int]) -> int:
    """The exit status of a child process: what the call returns, RAISED for an exception, negative for a signal.

    The calling process must have no other threads: a child would wait for theirs.
    """
    child = os.fork()
    if child == 0:
        os._exit(_in_child(call))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _in_child(call: Callable[[], int]) -> int:
    signal.alarm(_SECONDS)
    if not os.environ.get("ASAN_OPTIONS"):  # The sanitizer reports to stderr, and reserves all addresses.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    try:
        return call()
    except Exception:
        return RAISED
    except BaseException:
        traceback.print_exc()
        return 1
