"""A model's process: `python -m cobatch.engines.python.child NAME PARENT SOCKET BEGUN INPUTS OUTPUTS ...`.

NAME is for the list of processes; PARENT is home's number, the others are descriptors: the socket, and
regions: one for the number of the batch that has begun, and those of each slot. Signals are for home, which
ends its processes.
"""

import ctypes
import faulthandler
import os
import signal
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import msgspec

from cobatch.engines.errors import EngineError, EngineLoadError
from cobatch.engines.python.memory import Region, read, write
from cobatch.engines.python.messages import (
    MARK,
    MESSAGE_BYTES,
    MOST_TEXT,
    TELL_SIGNAL,
    Failed,
    Loaded,
    NotLoaded,
    Ran,
    Run,
    Start,
    decode_to_child,
    encode,
)
from cobatch.engines.python.model import PythonModel, load

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_OOM_SCORE = b"500"  # without memory the kernel ends this process rather than the server


def join_home(parent: int) -> None:
    """End with home, leave signals to it, and write each line at once."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it ended before
    for sig in _IGNORED:
        signal.signal(sig, lambda *_: None)  # SIG_IGN would be inherited by the model's own processes
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_bytes(_OOM_SCORE)
    faulthandler.enable()
    faulthandler.register(TELL_SIGNAL, chain=True)  # and ends then, as the signal does by default
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def main() -> None:
    """Load the model and run its batches until home closes the socket."""
    parent, *descriptors = map(int, sys.argv[2:])
    del sys.argv[1:]
    join_home(parent)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    sock = socket.socket(fileno=descriptors[0])
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MESSAGE_BYTES)
    regions = [Region(descriptor) for descriptor in descriptors[1:]]
    begun = regions.pop(0).number()
    slots = list(zip(regions[::2], regions[1::2], strict=True))
    start = decode_to_child(sock.recv(MESSAGE_BYTES))
    assert isinstance(start, Start)
    try:
        model = load(*msgspec.structs.astuple(start), alone=True)
    except EngineLoadError as error:
        sock.send(encode(NotLoaded(encodable(str(error)[:MOST_TEXT]))))
        return
    sock.send(encode(Loaded(model.signature, model.own_requests)))
    while data := sock.recv(MESSAGE_BYTES):
        run = decode_to_child(data)
        assert isinstance(run, Run)
        begun[0] = run.number
        sock.send(encode(answer(model, run, *slots[run.slot])))


def answer(model: PythonModel, run: Run, inputs: Region, outputs: Region) -> Ran | Failed:
    """Run a batch. An exception that is no error of the model, as by `sys.exit`, ends the process."""
    signature = model.signature
    try:
        arrays = model.run(read(signature.inputs, run.inputs, inputs))
        return Ran(run.number, write(signature.outputs, arrays, outputs))
    except Exception as error:  # noqa: BLE001 - the model's own code
        text = str(error) if isinstance(error, EngineError) else traceback.format_exc()
        failed = Failed(run.number, encodable(text[-MOST_TEXT:]), type(error).__name__)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the model may have closed it
            stream.flush()
    with suppress(OSError):
        os.write(1, b"\n%s%d\n" % (MARK, run.number))
    return failed


def encodable(text: str) -> str:
    """Return the text with lone surrogates, as of a file name, escaped: UTF-8 has none."""
    return text.encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    main()
