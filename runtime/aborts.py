"""Where JAX's C++ runtime ends a process: a last line in place of an abort."""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

# What begins a connection of gRPC (RFC 9113, section 3.4): a server replies.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


def answers(address: str) -> bool:
    """Does a server of gRPC at HOST:PORT reply?

    To connect is not enough: the kernel still does that for a process that is stopped
    or about to be gone.
    """
    host, _, port = address.rpartition(":")
    try:
        where = host.strip("[]"), int(port)
        with socket.create_connection(where, timeout=2) as line:
            line.sendall(_HELLO)
            return bool(line.recv(1))
    except OSError:
        return False


def tell(text: str) -> None:
    """Writes to standard error, from any thread or signal handler."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))


_kept: list[Any] = []  # C calls these: they must not be freed


def call_instead(call: Callable[[], None]) -> None:
    """Calls `call` where the C++ runtime would abort this process.

    JAX ends a process that loses the coordination service by std::terminate or abort
    in a thread of its own, without a way to say so in Python.
    """
    if not sys.platform.startswith("linux"):
        return
    terminate = ctypes.CFUNCTYPE(None)(call)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda number: call())
    _kept.extend([terminate, handler])
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = [ctypes.c_int, type(handler)]
        libc.signal.restype = ctypes.c_void_p
        libc.signal(int(signal.SIGABRT), handler)
    with contextlib.suppress(OSError, AttributeError):
        set_terminate = ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE
        set_terminate.argtypes = [type(terminate)]
        set_terminate.restype = ctypes.c_void_p
        set_terminate(terminate)
