"""Print the declarations of NVIDIA's bindings as JSON. Run by the conformance test, in a new process.

By class: its enumerators, or its members; a method has the parameter names of each overload, which are only
in pybind11's docstrings.
"""

from __future__ import annotations

import json
import re
from typing import Any


def parameters(signature: str) -> list[str]:
    """Return the names in `f(self: T, a: X[int, str], b: Y = <Y.A: 0>) -> Z`, without self."""
    inside = signature[signature.index("(") + 1 :]
    depth, part, parts = 0, "", []
    for letter in inside:
        if letter == ")" and depth == 0:
            break
        depth += (letter in "([<{") - (letter in ")]>}")
        if letter == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += letter
    names = [text.strip().partition(":")[0].strip() for text in [*parts, part] if text.strip()]
    return [name for name in names if name != "self"]


def member(name: str, value: Any) -> Any:
    """Return "property", "value", or a method's overloads."""
    if isinstance(value, property):
        return "property"
    if isinstance(value, type) or not callable(value):
        return "value"
    lines = (value.__doc__ or "").splitlines()
    signatures = [
        line for line in lines if re.match(rf"\s*(\d+\. )?{name}\(", line) and "*args, **kwargs" not in line
    ]
    return [parameters(line) for line in signatures]


def describe(cls: Any) -> dict[str, Any]:
    """Return the declaration of an enumeration or a class."""
    if hasattr(cls, "__members__"):
        return {"enum": {name: int(value) for name, value in cls.__members__.items()}}
    names = [name for name in dir(cls) if not name.startswith("_") or name in {"__init__", "__bool__"}]
    return {"members": {name: member(name, getattr(cls, name)) for name in names}}


def main() -> None:
    import tensorrt_bindings as trt  # type: ignore[import-not-found]  # noqa: PLC0415

    classes = {name: value for name, value in vars(trt).items() if isinstance(value, type)}
    described = {name: describe(value) for name, value in classes.items()}
    print(json.dumps({"version": trt.__version__, "classes": described}))  # noqa: T201 - a program


if __name__ == "__main__":
    main()
