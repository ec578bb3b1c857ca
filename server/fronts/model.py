"""A model in home as a front has it: its codecs, and the batcher of a link."""

from collections.abc import Sequence

from cobatch.batcher.durations import PENDING_LIMIT
from cobatch.batcher.request import Request
from cobatch.engines.base import Array, Signature
from cobatch.engines.link.messages import BatchInfo
from cobatch.server.http.body import Body
from cobatch.server.http.reply import Reply
from cobatch.server.inference.padding import make_padder
from cobatch.server.inference.served import ServedModel
from cobatch.server.links.remote import RemoteBatch, RemoteBatcher, RemoteModel
from cobatch.server.links.rows import has_strings, written
from cobatch.server.settings.schema import ModelSettings
from cobatch.server.v2.decode import Decoded, Decoder, WantedOutputs
from cobatch.server.v2.encode import Encoder, Shared, timing_of_batch


class FrontDecoder(Decoder):
    """Decodes BYTES inputs to the pieces that are sent: of long ones in the thread that decodes them."""

    def decode(self, body: Body, json_length: int | None) -> Decoded:
        decoded = Decoder.decode(self, body, json_length)
        decoded.payloads = [written(payload) for payload in decoded.payloads]
        return decoded


class FrontEncoder(Encoder):
    """Encodes responses whose ids name the place in home where the request ran."""

    def encode(
        self, request: Request, wanted: WantedOutputs, message_id: str | None, usage: bool = False
    ) -> Reply:
        reply = Encoder.encode(self, request, wanted, message_id, usage)
        batch = request.batch
        if type(batch) is RemoteBatch and batch.number:
            reply.request_id = b"%b%d" % (batch.lead, request.entry)  # type: ignore[str-format]  # a row
        return reply


class FrontModel(RemoteModel, ServedModel):
    """A model in home, with its codecs."""

    batcher: RemoteBatcher | None

    def __init__(self, settings: ModelSettings, index: int, fronts: int) -> None:
        ServedModel.__init__(self, settings)
        RemoteModel.__init__(self, settings.name, index, settings.max_queue_rows, fronts)

    def use(self, signature: Signature) -> None:
        padder = make_padder(self.name, self.settings.pad, signature)
        make_decoder = FrontDecoder if has_strings(signature.inputs) else Decoder
        self.decoder = make_decoder(signature, self.max_queue_rows, padder)
        self.encoder = FrontEncoder(self.name, self.version, signature)

    def new_batch(self, info: BatchInfo, lead: bytes, outputs: Sequence[Array]) -> RemoteBatch:
        batch = super().new_batch(info, lead, outputs)
        shapes = tuple([output.shape[1:] for output in outputs])
        batch.memo["shared"] = Shared(shapes, timing_of_batch(batch), None)  # `FrontEncoder` gives ids
        return batch

    def delivered(self) -> None:
        durations = self.infer_traffic.durations
        if len(durations.values) >= PENDING_LIMIT:
            durations.count_in()

    @property
    def ready(self) -> bool:
        """A request would be accepted, unless the queue is full."""
        return self.batcher is not None and self.batcher.usable
