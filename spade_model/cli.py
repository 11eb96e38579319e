"""The entry point of the `spade` command; `commands.py` contains the subcommands.

Only the standard library is imported at the top, so that missing packages, and Ctrl-C during imports, end in a message
and not in a traceback. Printing never decides the exit status: nobody may be reading.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from spade_model.errors import UserError

_USAGE = """usage: spade <command> [options]

commands:
  train      train a model; `torchrun --nproc_per_node N -m spade_model.cli train ...` for several processes
  generate   make images from masks
  convert    convert checkpoints from and to other projects' layouts
  bench      compare times and memory with stock PyTorch, on this machine and your masks
  doctor     show the environment; with options, such as --dataroot, check a whole data set

`spade <command> --help` lists the options.
"""

_COMMANDS = ("train", "generate", "convert", "bench", "doctor")

_EXTRAS = {
    "PIL": "pillow",
    "tyro": "tyro",
    "tqdm": "tqdm",
    "jinja2": "jinja2",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
}
"""Packages that only the extra "model" installs, keyed by the name of their top-level module."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status.

    The status is 0 on success, also when a signal stopped a training run and its state was saved; 2 for unusable input
    and for missing packages; and 130 for any other interruption.

    With SPADE_DEBUG=1 in the environment, errors also show their traceback.
    """
    # OpenMP's threads then leave the core to others while they wait. It is read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with _printing_never_fails():
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        return _status(list(sys.argv[1:] if argv is None else argv))


class _Unfailing(io.FileIO):
    """A file that drops what it cannot write, because a pipe or terminal is closed, full or not ready."""

    def write(self, data: Any, /) -> int:
        try:
            # None is returned where writing would have to wait.
            return super().write(data) or len(data)
        except OSError:
            return len(data)


@contextmanager
def _printing_never_fails() -> Iterator[None]:
    """Replaces stdout and stderr by streams that escape what the encoding lacks and drop what cannot be written."""
    # A file that is opened later would otherwise get the number of a closed stream, and its output.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    own = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _unfailing(own[0], 1), _unfailing(own[1], 2)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = own


def _unfailing(stream: Any, number: int) -> Any:
    """Returns a stream that cannot fail for the standard stream with a descriptor's number, and others as they are."""
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.flush()
        try:
            if stream.fileno() != number:
                return stream
        except (AttributeError, OSError, ValueError):
            return stream
    raw = io.BufferedWriter(_Unfailing(number, "w", closefd=False))
    encoding = None if stream is None else stream.encoding
    return io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace", line_buffering=True)


def _status(arguments: list[str]) -> int:
    """Runs the command and returns its exit status; prints the message of an error."""
    try:
        return _run(arguments)
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        package = _EXTRAS.get((error.name or "").partition(".")[0])
        if package is None:
            raise
        return _fail(
            f"this command needs {package}, which is not installed; the extra 'model' of spade-kernels installs it. "
            'In the checkout, run: pip install --no-build-isolation ".[model]"'
        )
    except SystemExit as end:
        # The option parser exits with 0 after --help and with 2 after an invalid option.
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_USAGE)
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        import spade_kernels

        print(f"spade-kernels {spade_kernels.__version__}")
        return 0
    if arguments[0] not in _COMMANDS:
        raise UserError(f"unknown command {arguments[0]!r}; choose one of {', '.join(_COMMANDS)}")
    if arguments == ["doctor"]:
        _print_environment()
        return 0
    with _ctrl_c_ends_at_once():
        from spade_model import commands
    return commands.run(arguments[0], arguments[1:])


@contextmanager
def _ctrl_c_ends_at_once() -> Iterator[None]:
    """Makes Ctrl-C end the process immediately while torch is imported.

    A half-imported torch can lose a KeyboardInterrupt, or print its statistics at exit.
    """

    def leave(number: int, frame: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(130)

    # A handler that the caller installed stays in place, and only the main thread can set one.
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _print_environment() -> None:
    with _ctrl_c_ends_at_once():
        import spade_kernels

    info = spade_kernels.build_info()
    backends: Any = info.pop("backends")
    kernels: Any = info.pop("kernels")
    for name, value in info.items():
        print(f"{name:14} {value}")
    for name, reason in backends.items():
        print(f"{'  ' + name:14} {'can run' if reason is None else 'cannot run: ' + reason}")
        if used := [operator for operator, taken in kernels.items() if taken == name]:
            print(f"    runs {', '.join(used)}")


def _fail(message: str) -> int:
    if os.environ.get("SPADE_DEBUG") == "1":
        traceback.print_exc()
    print(f"spade: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
