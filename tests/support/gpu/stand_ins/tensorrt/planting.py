"""What tests plant in the stand-ins; none of this is in NVIDIA's module."""

from __future__ import annotations

from collections import defaultdict

_planted: dict[str, list[tuple[str, str]]] = defaultdict(list)
_strict_graphs = True


def plant(method: str, text: str, code: str = "FAILED_EXECUTION") -> None:
    """The next call of this method fails as TensorRT's do: it tells the error and answers False or None.

    Methods that can: `deserialize_cuda_engine`, `create_execution_context`, `set_input_shape`,
    `infer_shapes`, `execute_async_v3`, `build_serialized_network`.
    """
    _planted[method].append((code, text))


def take(method: str) -> tuple[str, str] | None:
    """The error planted for this method, if there is one."""
    return _planted[method].pop(0) if _planted[method] else None


def strict_graphs(on: bool) -> None:
    """Whether launching a graph whose execution context was given other shapes since breaks a rule.

    It does unless a test says otherwise. The careful reading of what a graph fixes, not one that was checked
    against NVIDIA's documentation or a GPU.
    """
    global _strict_graphs  # noqa: PLW0603 - a switch of the process
    _strict_graphs = on


def graphs_are_strict() -> bool:
    """What `strict_graphs` said."""
    return _strict_graphs


def clear() -> None:
    """Plant nothing."""
    _planted.clear()
    strict_graphs(True)
