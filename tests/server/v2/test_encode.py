"""The answers of one batch share work, but each has its own rows, shape and outputs."""

from __future__ import annotations

import msgspec
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cobatch.batcher.request import Batch, Request
from cobatch.engines.base import Signature, TensorSpec
from cobatch.server.v2.encode import Encoder

Y, Z = TensorSpec("y", "FP32", (2,)), TensorSpec("z", "INT64", ())
WANTED = st.sampled_from(
    [((0, False), (1, False)), ((0, True), (1, True)), ((1, False),), ((0, True),)]  # index, as binary
)


@given(st.lists(st.tuples(st.integers(1, 3), WANTED), min_size=1, max_size=6))
def test_each_answer_has_its_own_rows(asked: list[tuple[int, tuple[tuple[int, bool], ...]]]) -> None:
    total = sum(rows for rows, _ in asked)
    batch = Batch([], total, (), "full", number=1)
    y, z = np.arange(2 * total, dtype=np.float32).reshape(total, 2), np.arange(total) + 100
    batch.outputs = y, z
    encoder = Encoder("m", "1", Signature((), (Y, Z)))
    first = 0
    for rows, wanted in asked:
        request = Request(rows, (), ())
        request.batch, request.first_row = batch, first
        reply = encoder.encode(request, wanted, None)
        body = b"".join(reply.body)
        tail = b"" if reply.json_length is None else body[reply.json_length :]
        outputs = msgspec.json.decode(body[: reply.json_length])["outputs"]
        assert reply.request_id is not None
        assert reply.request_id.endswith(b"%d" % first)
        assert len(outputs) == len(wanted)
        for (index, binary), output in zip(wanted, outputs, strict=True):
            own = batch.outputs[index][first : first + rows]
            assert output["name"] == "yz"[index]
            assert output["shape"] == list(own.shape)
            if binary:
                assert output["parameters"] == {"binary_data_size": own.nbytes}
                assert tail[: own.nbytes] == own.tobytes()
                tail = tail[own.nbytes :]
            else:
                assert output["data"] == own.reshape(-1).tolist()
        assert not tail
        first += rows
