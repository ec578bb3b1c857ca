"""The messages between home and a model's process, as MessagePack, one a datagram (SOCK_SEQPACKET).

Home sends `Start`, and then a `Run` for each batch; the process answers `Loaded` or `NotLoaded`, and then
`Ran` or `Failed` for each batch, in their order. Tensors lie in a slot's regions (`engines.python.memory`).
"""

import signal
from typing import Any

import msgspec
from msgspec import Struct

from cobatch.engines.base import Batching, Signature
from cobatch.engines.errors import BadRequest, EngineRunError, OutputError

# Linux takes a datagram only if it fits in the send buffer, of which it sets twice as much.
MESSAGE_BYTES = 160 << 10
# Of an error's text.
MOST_TEXT = 16 << 10
# Makes the process write where its threads are, and end.
TELL_SIGNAL = signal.SIGRTMIN
# Begins a line that ends the output of a batch that failed, with its number; written before `Failed` is sent.
MARK = b"\0end of batch "


class Tensors(Struct, frozen=True, array_like=True, gc=False):
    """Tensors in a region: the shape and offset of each, and the bytes of its strings, 0 for numbers.

    `end`: of the last one.
    """

    shapes: tuple[tuple[int, ...], ...]
    places: tuple[int, ...]
    strings: tuple[int, ...]
    end: int


class Start(Struct, frozen=True, array_like=True, tag=0):
    """Load this model (see `engines.python.model.load`)."""

    source: str
    folder: str
    device: int
    batching: Batching
    arguments: tuple[Any, ...] = ()


class Run(Struct, frozen=True, array_like=True, tag=1, gc=False):
    """Run the batch in a slot. `number`: the process writes it to its first region when it begins."""

    number: int
    slot: int
    inputs: Tensors


class Loaded(Struct, frozen=True, array_like=True, tag=16):
    """The model is loaded. `own_requests`: it has `preprocess` or `postprocess`."""

    signature: Signature
    own_requests: bool = False


class NotLoaded(Struct, frozen=True, array_like=True, tag=17):
    """The model cannot be loaded."""

    text: str


class Ran(Struct, frozen=True, array_like=True, tag=18, gc=False):
    """The batch of this number has run."""

    number: int
    outputs: Tensors


class Failed(Struct, frozen=True, array_like=True, tag=19):
    """The batch of this number failed. `kind`: the error's, a key of `KINDS`, or that of an exception."""

    number: int
    text: str
    kind: str


KINDS: dict[str, type[EngineRunError]] = {kind.__name__: kind for kind in (OutputError, BadRequest)}


FromChild = Loaded | NotLoaded | Ran | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_child = msgspec.msgpack.Decoder(Start | Run).decode
decode_to_home = msgspec.msgpack.Decoder[FromChild](FromChild).decode
