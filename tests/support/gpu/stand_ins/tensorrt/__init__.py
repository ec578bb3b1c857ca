"""Stands in for NVIDIA's `tensorrt` over the fake driver: what cobatch uses of it, and no more.

Every name and parameter here is compared with NVIDIA's own bindings by
tests/engines/tensorrt/test_conformance.py. It is 10.16 unless STAND_IN_TENSORRT says otherwise, or
`versions.use` does: names that a version lacks are not there, and enumerators count as they do in that
version.

A plan holds its model as ONNX, and `execute_async_v3` queues a kernel that computes through ONNX Runtime, on
the fake device's memory, when the stream reaches it. A rule of TensorRT's, or of cobatch's (one thread), that
is broken makes the call fail, and is told to the fake driver.
"""

from .builder import Builder as Builder
from .builder import IBuilderConfig as IBuilderConfig
from .builder import IHostMemory as IHostMemory
from .builder import INetworkDefinition as INetworkDefinition
from .builder import IOptimizationProfile as IOptimizationProfile
from .builder import ITensor as ITensor
from .builder import ITimingCache as ITimingCache
from .context import IExecutionContext as IExecutionContext
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
