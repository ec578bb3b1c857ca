"""The messages between a front-end process and the engine process, as MessagePack arrays.

A datagram is a list of messages of one direction. Payloads are the tensors of a request, or of the requests
of an answer, one after another: little-endian, in C order; each element of a BYTES tensor is its length (u32)
and its bytes, as in the V2 protocol's binary form. Small ones are in the message itself. A larger one is in a
block of the sender's slab (`engines.link.slab`), and the message has the block's offset: the sender does not
touch the block before the receiver gives it back, by answering the request or, of an answer, by `Release`.

Each side decodes strictly: a datagram of another form ends the link (`engines.link.channel`).
"""

import struct
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

# A payload up to this length travels in the message.
INLINE_BYTES = 16 << 10
# A datagram of this length or more takes no further message.
DATAGRAM_BYTES = 48 << 10
# Ids that a bundle has, its own and its members'.
BUNDLE_IDS = 128
# The longest message, as MessagePack.
MESSAGE_BYTES = 320 << 10

Whole = Annotated[int, Meta(ge=0)]
Count = Annotated[int, Meta(ge=1)]
Shape = tuple[Whole, ...]
# The payload itself, or the offset of its block.
Payload = bytes | Whole


class BatchInfo(Struct, frozen=True, array_like=True, gc=False):
    """A batch that ran, for the fronts of its requests. The fields are those of `batcher.request.Batch`.

    `joined`: those that a split request's rows ran in.
    """

    number: int
    rows: int
    reason: str
    engine: int
    slot: int
    gathered_s: float
    dispatched_s: float
    started_s: float
    finished_s: float
    failed: bool = False
    joined: tuple["BatchInfo", ...] = ()


# From a front


class Submit(Struct, frozen=True, array_like=True, tag=0, gc=False):
    """A request, or a bundle of `callers` requests of one row each: the bundle's `id` is a multiple of
    BUNDLE_IDS, and its members' are the next ones. Answers name the bundle, or else each member.

    `model`: its index in the settings. `sizes`: bytes of each input in the payload. `shapes`: of a row of
    each input, None where the signature fixes them. `tenant`: a number that `Tenant` introduced, 0 for none.
    `source`: the connection of an anonymous caller. `timeout_s`: from now on.
    """

    id: Whole
    model: Whole
    rows: Count
    sizes: tuple[Whole, ...]
    payload: Payload
    callers: Count = 1
    shapes: tuple[Shape, ...] | None = None
    tenant: Whole = 0
    source: Whole = 0
    priority: int = 0
    timeout_s: float | None = None


class Cancel(Struct, frozen=True, array_like=True, tag=1, gc=False):
    """The callers of these requests left. Each is answered by `Dropped`, unless its answer is on its way."""

    ids: tuple[Whole, ...]


class Release(Struct, frozen=True, array_like=True, tag=2, gc=False):
    """The blocks of answers at these offsets are read."""

    offsets: tuple[Whole, ...]


class Tenant(Struct, frozen=True, array_like=True, tag=3, gc=False):
    """A tenant's number on this link, its name, and the index of the rule that sets its limits."""

    number: Count
    name: str
    rule: Whole


class Report(Struct, frozen=True, array_like=True, tag=4):
    """Counts since the last report, and records of requests (`server.fronts.reports`)."""

    content: msgspec.Raw


# To a front


class Welcome(Struct, frozen=True, array_like=True, tag=16):
    """The first message. `process`: the token in request ids; `models`: the number of them."""

    process: str
    models: Whole


class Loaded(Struct, frozen=True, array_like=True, tag=17):
    """A model is loaded: its signature (`engines.base.Signature` as MessagePack) and its largest batch; or it
    could not be loaded: `error`."""

    model: Whole
    signature: bytes = b""
    max_batch_size: Whole = 0
    error: str = ""


class Answers(Struct, frozen=True, array_like=True, tag=18, gc=False):
    """Rows of one batch for requests of this front.

    `ids`: of requests and bundles; `places`: the first row of each in the batch. The payload has the rows of
    each output, in the order of `ids`; `shapes` are an output's rows' and `sizes` its bytes.
    """

    model: Whole
    batch: BatchInfo
    ids: tuple[Whole, ...]
    places: tuple[Whole, ...]
    shapes: tuple[Shape, ...]
    sizes: tuple[Whole, ...]
    payload: Payload


class Failed(Struct, frozen=True, array_like=True, tag=19):
    """A request, or each of a bundle, has a problem instead of an answer (`server.http.problem`)."""

    id: Whole
    slug: str
    detail: str
    members: dict[str, Any]
    close: bool = False
    batch: BatchInfo | None = None
    enqueued_s: float = 0.0


class Dropped(Struct, frozen=True, array_like=True, tag=20, gc=False):
    """These requests were cancelled: their blocks are free, and nothing else will be sent for them."""

    ids: tuple[Whole, ...]


class Collect(Struct, frozen=True, array_like=True, tag=21, gc=False):
    """Send a report now, with this number."""

    number: Whole


FromFront = Submit | Cancel | Release | Tenant | Report
ToFront = Welcome | Loaded | Answers | Failed | Dropped | Collect

decode_from_front = msgspec.msgpack.Decoder(list[FromFront]).decode
decode_to_front = msgspec.msgpack.Decoder(list[ToFront]).decode

_encode_into = msgspec.msgpack.Encoder().encode_into
_HEAD = struct.Struct(">BI")  # of a MessagePack array of any length: its type, the number of elements
_ARRAY32 = 0xDD


class Datagram:
    """A datagram that is filled with messages of one direction."""

    __slots__ = ("_count", "data")

    def __init__(self) -> None:
        self.data = bytearray(_HEAD.size)
        self._count = 0

    def add(self, message: FromFront | ToFront) -> bool:
        """Add a message; return True if the datagram is full then. Raises ValueError if it is too long."""
        data = self.data
        before = len(data)
        _encode_into(message, data, before)
        after = len(data)
        if after - before > MESSAGE_BYTES:
            del data[before:]
            raise ValueError(f"a message of {after - before} bytes: at most {MESSAGE_BYTES} can be sent")
        self._count += 1
        return after >= DATAGRAM_BYTES

    def close(self) -> bytearray:
        """Return the datagram as it is sent."""
        _HEAD.pack_into(self.data, 0, _ARRAY32, self._count)
        return self.data
