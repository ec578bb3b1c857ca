"""A stand-in for NVIDIA's `tensorrt` over the fake driver, with the parts that cobatch uses.

tests/engines/tensorrt/test_conformance.py compares every name and parameter with NVIDIA's bindings. The
version is 10.16 unless STAND_IN_TENSORRT or `versions.use` sets another: names that a version lacks are
missing, and enumerators have the values of that version.

A plan holds its model as ONNX, and `execute_async_v3` queues a kernel that runs ONNX Runtime on the fake
device's memory when the stream reaches it. A broken rule of TensorRT, or of cobatch (one thread), makes the
call fail and is reported to the fake driver.
"""

from .builder import Builder as Builder
from .builder import IBuilderConfig as IBuilderConfig
from .builder import IHostMemory as IHostMemory
from .builder import INetworkDefinition as INetworkDefinition
from .builder import IOptimizationProfile as IOptimizationProfile
from .builder import ITensor as ITensor
from .builder import ITimingCache as ITimingCache
from .context import IExecutionContext as IExecutionContext
from .context import IOutputAllocator as IOutputAllocator
from .logs import IErrorRecorder as IErrorRecorder
from .logs import ILogger as ILogger
from .logs import IProgressMonitor as IProgressMonitor
from .logs import Logger as Logger
from .parser import OnnxParser as OnnxParser
from .parser import ParserError as ParserError
from .runtime import ICudaEngine as ICudaEngine
from .runtime import Runtime as Runtime
from .versions import use as _use

_use()
