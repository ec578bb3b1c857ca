"""Errors that tests plant in the stand-ins; not a part of NVIDIA's module."""

from __future__ import annotations

from collections import defaultdict

_planted: dict[str, list[tuple[str, str]]] = defaultdict(list)
_strict_graphs = True


def plant(method: str, text: str, code: str = "FAILED_EXECUTION") -> None:
    """Make the next call of a method fail as in TensorRT: it logs the error, and returns nothing or raises.

    Methods: `Runtime`, `deserialize_cuda_engine`, `create_execution_context`, `set_input_shape`,
    `set_optimization_profile_async`, `infer_shapes`, `execute_async_v3`, `build_serialized_network`.
    """
    _planted[method].append((code, text))


def take(method: str) -> tuple[str, str] | None:
    """Return the error planted for this method, or None."""
    return _planted[method].pop(0) if _planted[method] else None


def strict_graphs(on: bool) -> None:
    """Set if launching a graph breaks a rule once its execution context has other shapes (the default).

    This is a cautious reading, not checked against NVIDIA's documentation or a GPU.
    """
    global _strict_graphs  # noqa: PLW0603 - a switch of the process
    _strict_graphs = on


def graphs_are_strict() -> bool:
    """Return the setting of `strict_graphs`."""
    return _strict_graphs


def clear() -> None:
    """Remove all planted errors."""
    _planted.clear()
    strict_graphs(True)
