"""A child process of the supervisor, home or a front: `python -m cobatch.server.fronts.child FD NAME`.

FD is its end of the control socket; NAME is for the list of processes. Signals are for the supervisor, which
tells its children: a terminal and some service managers send them to all processes.
"""

import ctypes
import signal
import socket
import sys
from contextlib import closing
from importlib import import_module

from cobatch.server.fronts.control import Parent, Role

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A child imports its own role's only.
_SERVERS: dict[Role, tuple[str, str]] = {"home": ("home", "Home"), "front": ("front", "Front")}
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def join_supervisor() -> Parent:
    """Ignore signals, end with the supervisor, and receive its first message."""
    for sig in _IGNORED:
        signal.signal(sig, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)  # blocked by the supervisor until now
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    end = socket.socket(fileno=int(sys.argv[1]))
    end.set_inheritable(False)
    return Parent(end)


def main() -> int:
    """Serve until the supervisor ends it; return the exit status."""
    with closing(join_supervisor()) as parent:
        return _serve(parent)


def _serve(parent: Parent) -> int:
    from cobatch.server.serve import run_server  # noqa: PLC0415 - heavy, and the supervisor could end meanwhile

    module, name = _SERVERS[parent.start.role]
    server = getattr(import_module(f"cobatch.server.fronts.{module}"), name)
    return run_server(parent.settings, lambda log_stream: server(parent.settings, log_stream, parent), list)


if __name__ == "__main__":
    sys.exit(main())
