"""The messages between home and a process of a pipeline's pool, as MessagePack, one a datagram.

Home sends `Start`, and then a `Call` for each request; the process answers `Described` or `NotLoaded`, and
for each call `Begun`, `Head`, any number of `Data`, and one `End`; no `Head` where the call failed. Calls
run at the same time, so each message has its call's number.
"""

from typing import Any

import msgspec
from msgspec import Struct

from cobatch.server.links.step_end import LinkedModel
from cobatch.server.observability.record import StepTimes

# Items of a stream that the client has not taken yet; then its generator waits.
MOST_AHEAD = 16
# Of an error's text.
MOST_TEXT = 16 << 10
NOTHING = memoryview(b"")


# To the process


class Start(Struct, frozen=True, array_like=True, tag=0):
    """Load this class or function (`FILE.py:NAME` or `MODULE:NAME`, in `folder`). `models`: the server's.

    `around`: the model's name, if it is a model in Python, of which only `preprocess` and `postprocess` are
    wanted. `datatypes`: V2's, of its inputs. `batched`: its first axis is rows.
    """

    source: str
    folder: str
    models: tuple[LinkedModel, ...]
    around: str = ""
    datatypes: dict[str, str] = {}
    batched: bool = True


class Call(Struct, frozen=True, array_like=True, tag=1, gc=False):
    """A request. `size`: bytes of its body, which is in `data` or in the descriptor that comes with it.

    `tenant`: its name and the index of its rule. `source`: of an anonymous caller. `timeout_s`: from now on.
    """

    number: int
    content_type: str
    size: int
    data: memoryview = NOTHING
    request_id: str = ""
    tenant: tuple[str, int] | None = None
    source: int = 0
    priority: int = 0
    timeout_s: float | None = None


class Cancel(Struct, frozen=True, array_like=True, tag=2, gc=False):
    """No one waits for this call any more. It still has its `End`."""

    number: int


class Taken(Struct, frozen=True, array_like=True, tag=3, gc=False):
    """The client has taken one more item of this call's stream."""

    number: int


# To home


class Described(Struct, frozen=True, array_like=True, tag=16):
    """It is loaded. `accepts`: content types, () for any; `returns`: the answer's, "" if that is up to it.

    `streamed`: it answers in parts. `concurrent`: it takes calls while others run. `schemas`: JSON schemas of
    request and answer, None where they are no JSON.
    """

    accepts: tuple[str, ...]
    returns: str
    streamed: bool
    concurrent: bool
    summary: str = ""
    request_schema: dict[str, Any] | None = None
    answer_schema: dict[str, Any] | None = None


class NotLoaded(Struct, frozen=True, array_like=True, tag=17):
    """It cannot be loaded."""

    text: str


class Begun(Struct, frozen=True, array_like=True, tag=21, gc=False):
    """The process has received this call. Others may run in another process, if this one ends."""

    number: int


class Head(Struct, frozen=True, array_like=True, tag=18, gc=False):
    """The answer begins. `streamed`: each `Data` is an item of a stream of events."""

    number: int
    content_type: str
    streamed: bool


class Data(Struct, frozen=True, array_like=True, tag=19, gc=False):
    """A part of the answer, of `size` bytes: in `data`, or in the descriptor that comes with it."""

    number: int
    size: int
    data: memoryview = NOTHING


class End(Struct, frozen=True, array_like=True, tag=20):
    """The call has ended. `slug`: the kind of problem, "" if it has none, "failed" for an exception.

    `text` is for the client, but that of an exception, which is for the log. `members`: the problem's.
    """

    number: int
    slug: str = ""
    text: str = ""
    members: dict[str, Any] = {}
    steps: tuple[StepTimes, ...] = ()


ToChild = Start | Call | Cancel | Taken
ToHome = Described | NotLoaded | Begun | Head | Data | End

FAILED = "failed"

encode = msgspec.msgpack.Encoder().encode
decode_to_child = msgspec.msgpack.Decoder[ToChild](ToChild).decode
decode_to_home = msgspec.msgpack.Decoder[ToHome](ToHome).decode
