"""The bodies of answers as types, for the API's description only: whoever answers writes JSON directly.

A test holds every answer of a running server against them; unknown fields are refused, so that
what is added to an answer and not here fails it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from cobatch.engines.base import DATATYPES

Datatype = Annotated[str, Meta(extra_json_schema={"enum": list(DATATYPES)})]
Count = Annotated[int, Meta(ge=0)]
Shape = list[Count]
DynamicShape = Annotated[list[Annotated[int, Meta(ge=-1)]], Meta(description="-1: any size")]
Status = Literal["completed", "incomplete", "failed", "cancelled", "expired", "queued", "running"]


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """What all have in common."""


class ServerMetadata(Body):
    """What the server is, and which extensions of the protocol work."""

    name: str
    version: str
    extensions: list[str]


class Liveness(Body):
    """Whether the process is of use; `dead_models` need a new one."""

    live: bool
    dead_models: list[str] | UnsetType = UNSET


class Readiness(Body):
    """Whether every model takes requests."""

    ready: bool


class ModelReadiness(Body):
    """Whether this model takes requests."""

    name: str
    ready: bool


class TensorMetadata(Body):
    """An input or output. The first axis counts the rows."""

    name: str
    datatype: Datatype
    shape: DynamicShape


class ModelMetadata(Body):
    """The protocol's model metadata."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ConfigTensor(Body):
    """An input or output; `dims` are those of one row."""

    name: str
    data_type: str
    dims: DynamicShape
    optional: bool | UnsetType = UNSET


class VersionPolicy(Body):
    """Which versions are served."""

    specific: dict[Literal["versions"], list[str]]


class DynamicBatching(Body):
    """How batches are made; `max_queue_size`: the most rows that may wait."""

    preferred_batch_size: list[Count]
    max_queue_delay_microseconds: Count
    default_queue_policy: dict[Literal["max_queue_size"], Count]


class ModelConfiguration(Body):
    """Triton's model configuration, as far as its clients ask for it."""

    name: str
    platform: str
    backend: str
    version_policy: VersionPolicy
    max_batch_size: Count
    input: list[ConfigTensor]
    output: list[ConfigTensor]
    dynamic_batching: DynamicBatching


class Duration(Body):
    """How many there were, and how long they took together."""

    count: Count
    ns: Count


class InferenceStatistics(Body):
    """Times of requests, by what they were spent on."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class BatchStatistics(Body):
    """Times of batches of one size in rows."""

    batch_size: Count
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(Body):
    """Figures since the model was loaded; `last_inference` in milliseconds since the epoch, 0: none yet."""

    name: str
    version: str
    last_inference: Count
    inference_count: Count
    execution_count: Count
    inference_stats: InferenceStatistics
    batch_stats: list[BatchStatistics]
    padding: dict[str, Any] | UnsetType = UNSET


class Statistics(Body):
    """Triton's statistics."""

    model_stats: list[ModelStatistics]


class IndexEntry(Body):
    """A line of the repository's index."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNAVAILABLE"]
    reason: str


class BinarySize(Body):
    """How many of the bytes after the JSON are this tensor's."""

    binary_data_size: Count


class OutputTensor(Body):
    """One output: `data` in JSON, flat and row-major (not finite: null), or `parameters` and bytes."""

    name: str
    shape: Shape
    datatype: Datatype
    data: list[Any] | UnsetType = UNSET
    parameters: BinarySize | UnsetType = UNSET


class BatchUsage(Body):
    """Where an answer's time went, and how many rows rode in its batch."""

    batch_rows: Count
    queue_us: Count
    compute_us: Count


class InferResponse(Body):
    """The answer to an infer request; `id` is the request's, `parameters` come if `usage` was asked for."""

    model_name: str
    model_version: str
    outputs: list[OutputTensor]
    id: str | UnsetType = UNSET
    parameters: BatchUsage | UnsetType = UNSET


class PredictionOutput(Body):
    """One output: `data` nested as `shape` says, or `top_k`: index and score of the best, best first.

    Rows that could not be done are null.
    """

    dtype: str
    shape: Shape
    data: list[Any] | UnsetType = UNSET
    top_k: list[Any] | UnsetType = UNSET


class Usage(Body):
    """Rows of this prediction and of the batch that it rode in; microseconds in queue and in the engine."""

    rows: Count
    batch_rows: Count
    queue_us: Count
    compute_us: Count


class IncompleteDetails(Body):
    """Why some rows could not be done; `rows` are ranges, first and last row of each."""

    reason: str
    detail: str
    rows: list[tuple[Count, Count]]


class Prediction(Body):
    """A prediction as it is now. Fields that have nothing to say are left out."""

    id: str
    status: Status
    model: str
    outputs: dict[str, PredictionOutput] | UnsetType = UNSET
    usage: Usage | UnsetType = UNSET
    incomplete_details: IncompleteDetails | UnsetType = UNSET
    error: dict[str, Any] | UnsetType = UNSET


class BatchAnswer(Body):
    """One item's answer. `body` is JSON as it is, other text as a string, or left out where there is none."""

    id: str
    status: Annotated[int, Meta(ge=200, le=599)]
    headers: dict[str, str]
    body: Any | UnsetType = UNSET


class BatchResponse(Body):
    """All items' answers, in the items' order."""

    responses: list[BatchAnswer]


ANSWERS: tuple[Any, ...] = (
    ServerMetadata, Liveness, Readiness, ModelReadiness, ModelMetadata, ModelConfiguration, Statistics,
    IndexEntry, InferResponse, Prediction, BatchResponse,
)  # fmt: skip
