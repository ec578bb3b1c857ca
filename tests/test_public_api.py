"""`import cobatch`: light, and with exactly the public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cobatch


def test_the_import_is_light() -> None:
    program = "import sys, cobatch; print(sorted({'numpy', 'onnxruntime', 'starlette'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


def test_a_batched_function_needs_no_server_and_no_onnx_runtime() -> None:
    program = (
        "import sys; from cobatch import batched; print({'onnxruntime', 'starlette'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


def test_every_public_name_is_there_and_known_to_type_checkers() -> None:
    for name in cobatch.__all__:
        assert getattr(cobatch, name) is not None
    stub = ast.parse(Path(cobatch.__file__).with_name("__init__.pyi").read_text())
    typed = {
        alias.asname: (node.module, alias.name)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(typed) | {"__version__"} == set(cobatch.__all__) == set(dir(cobatch))
    for public, (module, attribute) in typed.items():
        assert getattr(sys.modules[str(module)], attribute) is getattr(cobatch, str(public))


def test_another_name_is_an_error() -> None:
    with pytest.raises(AttributeError, match="'cobatch' has no attribute 'nothing'"):
        _ = cobatch.nothing  # type: ignore[attr-defined]


def test_a_server_without_pipelines_imports_nothing_of_them() -> None:
    program = (
        "import sys, cobatch.server.app; rooms = 'cobatch.server.pipelines', 'cobatch.server.links'; "
        "print([one for one in sys.modules if one.startswith(rooms)])"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"
