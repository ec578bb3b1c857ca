"""cobatch: an inference server that batches concurrent requests dynamically, and its batcher as a library.

The names in `__all__` are the public API, which docs/library.md describes. Everything else is private:
`cobatch.server` is the HTTP edge, `cobatch.batcher` forms the batches, `cobatch.engines` runs them.
"""

from importlib import import_module

__version__ = "0.1.0"

# The module and the name of each public object: it is imported when it is used, so that `import cobatch` is
# light. __init__.pyi says the same to type checkers.
_PUBLIC = {
    "BadRequest": ("engines.errors", "BadRequest"),
    "BatchFailedError": ("batcher.errors", "BatchFailedError"),
    "Batched": ("batcher.library.function", "Batched"),
    "BatchedMethod": ("batcher.library.function", "BatchedMethod"),
    "Batcher": ("batcher.batcher", "Batcher"),
    "BatcherError": ("batcher.errors", "BatcherError"),
    "DeadlineExceeded": ("batcher.errors", "DeadlineExceeded"),
    "Engine": ("engines.base", "Engine"),
    "EngineError": ("engines.errors", "EngineError"),
    "EngineGoneError": ("batcher.errors", "EngineGoneError"),
    "EngineLoadError": ("engines.errors", "EngineLoadError"),
    "EngineOptions": ("engines.loader", "EngineOptions"),
    "EngineRunError": ("engines.errors", "EngineRunError"),
    "ExecutionTimeoutError": ("batcher.errors", "ExecutionTimeoutError"),
    "Explanation": ("batcher.library.call", "Explanation"),
    "InputRejectedError": ("batcher.errors", "InputRejectedError"),
    "ModelHandle": ("server.links.steps", "ModelHandle"),
    "QueueFull": ("batcher.errors", "QueueFullError"),
    "Request": ("batcher.request", "Request"),
    "Response": ("server.pipelines.handler", "Response"),
    "ResultCountError": ("engines.errors", "ResultCountError"),
    "Signature": ("engines.base", "Signature"),
    "Statistics": ("batcher.library.statistics", "Statistics"),
    "StepError": ("server.links.steps", "StepError"),
    "Tenant": ("batcher.tenant", "Tenant"),
    "TenantLimitError": ("batcher.errors", "TenantLimitError"),
    "TensorSpec": ("engines.base", "TensorSpec"),
    "Worker": ("engines.worker", "Worker"),
    "batched": ("batcher.library.function", "batched"),
    "model": ("server.links.steps", "model"),
    "prove_batching": ("engines.proof", "prove"),
    "settle_signature": ("engines.proof", "settle"),
}

__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604 - they are strings


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
