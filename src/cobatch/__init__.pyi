from cobatch.batcher.batcher import Batcher as Batcher
from cobatch.batcher.errors import BatcherError as BatcherError
from cobatch.batcher.errors import BatchFailedError as BatchFailedError
from cobatch.batcher.errors import DeadlineExceeded as DeadlineExceeded
from cobatch.batcher.errors import EngineGoneError as EngineGoneError
from cobatch.batcher.errors import ExecutionTimeoutError as ExecutionTimeoutError
from cobatch.batcher.errors import InputRejectedError as InputRejectedError
from cobatch.batcher.errors import QueueFullError as QueueFull
from cobatch.batcher.errors import TenantLimitError as TenantLimitError
from cobatch.batcher.library.call import Explanation as Explanation
from cobatch.batcher.library.function import Batched as Batched
from cobatch.batcher.library.function import BatchedMethod as BatchedMethod
from cobatch.batcher.library.function import batched as batched
from cobatch.batcher.library.statistics import Statistics as Statistics
from cobatch.batcher.request import Request as Request
from cobatch.batcher.tenant import Tenant as Tenant
from cobatch.engines.base import Engine as Engine
from cobatch.engines.base import Signature as Signature
from cobatch.engines.base import TensorSpec as TensorSpec
from cobatch.engines.errors import BadRequest as BadRequest
from cobatch.engines.errors import EngineError as EngineError
from cobatch.engines.errors import EngineLoadError as EngineLoadError
from cobatch.engines.errors import EngineRunError as EngineRunError
from cobatch.engines.errors import ResultCountError as ResultCountError
from cobatch.engines.loader import EngineOptions as EngineOptions
from cobatch.engines.proof import prove as prove_batching
from cobatch.engines.proof import settle as settle_signature
from cobatch.engines.worker import Worker as Worker
from cobatch.server.links.steps import ModelHandle as ModelHandle
from cobatch.server.links.steps import StepError as StepError
from cobatch.server.links.steps import model as model
from cobatch.server.pipelines.handler import Response as Response

__version__: str
__all__ = [
    "BadRequest",
    "BatchFailedError",
    "Batched",
    "BatchedMethod",
    "Batcher",
    "BatcherError",
    "DeadlineExceeded",
    "Engine",
    "EngineError",
    "EngineGoneError",
    "EngineLoadError",
    "EngineOptions",
    "EngineRunError",
    "ExecutionTimeoutError",
    "Explanation",
    "InputRejectedError",
    "ModelHandle",
    "QueueFull",
    "Request",
    "Response",
    "ResultCountError",
    "Signature",
    "Statistics",
    "StepError",
    "Tenant",
    "TenantLimitError",
    "TensorSpec",
    "Worker",
    "__version__",
    "batched",
    "model",
    "prove_batching",
    "settle_signature",
]
