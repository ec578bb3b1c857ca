"""Compare the stand-ins, and all names that the engine uses, with NVIDIA's bindings of three versions.

The bindings are small wheels, downloaded once into the cache. They can be imported without TensorRT, over a
library that defines the ten functions they link to and that is never called.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gpu.fakecuda.build import CannotBuildError, once, pip, run
from tests.support.gpu.tier import environment
from tests.support.paths import ROOT

ENGINE = sorted((ROOT / "engines" / "tensorrt").rglob("*.py"))
WHEELS = {
    "10.0.1": "tensorrt-cu12-bindings==10.0.1",
    "10.16.1.11": "tensorrt-cu13-bindings==10.16.1.11",
    "11.4.0.106": "tensorrt-cu13-bindings==11.4.0.106",
}
# The oldest version has no wheel for Python 3.13 and later.
HERE_ARE = [version for version in WHEELS if version != "10.0.1" or sys.version_info < (3, 13)]
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getInferLibVersion",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)

stand_ins: Any = importlib.import_module("tests.support.gpu.stand_ins.tensorrt")
versions: Any = importlib.import_module("tests.support.gpu.stand_ins.tensorrt.versions")

Described = dict[str, dict[str, Any]]


def _fetch(version: str, folder: Path) -> None:
    pip("download", "--no-deps", "--only-binary", ":all:", "-d", str(folder), WHEELS[version])
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder)
    source = folder / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{version.partition('.')[0]}"
        run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)])


def _folder(version: str) -> Path:
    python = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
    return once(f"tensorrt-{version}-{python}", lambda part: _fetch(version, part))


def _printed(program: str, version: str, *arguments: str) -> Any:
    """Return what a program prints as JSON in a process with the bindings of a version."""
    folder = str(_folder(version))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "gpu" / "stand_ins" / program), *arguments],
        env={**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": f"{folder}:{ROOT / 'src'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@functools.cache
def _read(version: str) -> Described:
    declared = _printed("read_bindings.py", version)
    assert declared["version"] == version
    classes: Described = declared["classes"]
    return classes


def real(version: str) -> Described:
    """Return the bindings' declarations; skip without them, or fail under CI."""
    try:
        return _read(version)
    except CannotBuildError as error:
        why = f"NVIDIA's bindings {version} cannot be had here: {error}"
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


@pytest.fixture(params=HERE_ARE)
def version(request: pytest.FixtureRequest) -> Iterator[str]:
    """Set the stand-ins to a version during the test."""
    versions.use(request.param)
    yield request.param
    versions.use()


def classes() -> dict[str, type]:
    return {name: value for name, value in vars(stand_ins).items() if isinstance(value, type)}


def enumerations() -> dict[str, Any]:
    return {name: value for name, value in classes().items() if issubclass(value, versions.Enum)}


def attributes(cls: type) -> set[str]:
    """Return a class's public names: of it and its bases, and the attributes set on `self`."""
    names: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("tests.support.gpu.stand_ins"):
            continue
        names |= {name for name in vars(base) if not name.startswith("_")}
        for node in ast.walk(ast.parse(inspect.getsource(base))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                names |= {node.attr} if not node.attr.startswith("_") else set()
    return names


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


# Members of `Owned`, with which the stand-ins hold memory.
OURS = {"on_its_thread"}


def test_the_wheels_have_the_versions_of_the_stand_ins() -> None:
    assert tuple(WHEELS) == versions.VERSIONS


def test_every_enumeration_has_nvidias_members(version: str) -> None:
    theirs = real(version)
    members = {
        name: {str(key): int(value.value) for key, value in cls.__members__.items()}
        for name, cls in enumerations().items()
    }
    assert members == {name: theirs[name]["enum"] for name in members}
    assert len(members) > 8


def test_every_class_and_member_exists_in_the_bindings(version: str) -> None:
    theirs = real(version)
    for name, cls in classes().items():
        if name in enumerations():
            continue
        assert name in theirs, f"{version} has no {name}"
        members = theirs[name]["members"]
        unknown = attributes(cls) - OURS - set(members)
        if issubclass(cls, bytes):
            unknown -= set(dir(bytes))
        assert not unknown, f"{version}: {name} has no {sorted(unknown)}"


def test_every_method_has_the_parameter_names_of_the_bindings(version: str) -> None:
    theirs = real(version)
    checked = 0
    for name, cls in classes().items():
        if name in enumerations():
            continue
        for method, function in inspect.getmembers(cls, inspect.isfunction):
            declared = theirs[name]["members"].get(method)
            hidden = method.startswith("_") and method not in {"__init__", "__bool__"}
            if method in OURS or hidden or not declared:
                continue
            ours = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
            assert ours in declared, f"{version}: {name}.{method} takes {declared}, ours {ours}"
            checked += 1
    assert checked > 40


def test_methods_and_properties_are_the_same_kind_as_in_the_bindings(version: str) -> None:
    theirs = real(version)
    for name, cls in classes().items():
        for attribute in set() if name in enumerations() else attributes(cls) - OURS:
            kind = theirs.get(name, {}).get("members", {}).get(attribute)
            if kind is not None:
                is_method = inspect.isfunction(getattr(cls, attribute, None))
                assert is_method == isinstance(kind, list), f"{version}: {name}.{attribute}"


def test_the_stand_in_lacks_the_names_that_a_version_lacks(version: str) -> None:
    theirs = real(version)
    for cls, member, _, _ in versions._versioned:
        has = member in theirs[cls.__name__]["members"]
        assert hasattr(cls, member) == has, f"{version}: {cls.__name__}.{member}"


def test_callbacks_have_the_parameters_of_the_bindings(version: str) -> None:
    from cobatch.engines.tensorrt.diagnostics import make_log, make_recorder  # noqa: PLC0415
    from cobatch.engines.tensorrt.plans.build import make_watch  # noqa: PLC0415

    theirs = real(version)
    callbacks = {
        "ILogger": make_log(stand_ins).logger,
        "IErrorRecorder": make_recorder(stand_ins),
        "IProgressMonitor": make_watch(stand_ins, lambda _phase, _fraction: True).monitor,
    }
    for name, instance in callbacks.items():
        for method, overloads in theirs[name]["members"].items():
            if not isinstance(overloads, list) or method == "__init__":
                continue
            ours = list(inspect.signature(getattr(instance, method)).parameters)
            # TensorRT calls them by position, and some of its parameters have no names.
            assert len(ours) == len(overloads[0]), f"{version}: {name}.{method}{overloads[0]}, ours {ours}"


def test_overrides_are_called_through_the_bindings(version: str) -> None:
    """C++ calls some of them by names that the Python class does not have."""
    real(version)
    called = _printed("call_overrides.py", version, "tensorrt_bindings")
    assert called == {
        "IErrorRecorder": [[False, False], 2, "two", False, "INVALID_STATE", 0],
        "ILogger": ["logged"],
        "IProgressMonitor": [[["all", 0.0], ["all", 0.5], ["all", 1.0]], [True, False]],
    }


def test_the_lean_runtime_without_a_gpu_is_refused() -> None:
    """The real one, which only logs that it has no driver and hands out a runtime that ends the process."""
    program = (
        "from cobatch.engines.tensorrt.engine import TensorRTEngine\n"
        "from cobatch.engines.errors import EngineLoadError\n"
        "engine = TensorRTEngine('model.plan', 8, runtime='tensorrt-lean', plan_source=lambda: b'no plan')\n"
        "try:\n"
        "    engine.open()\n"
        "except EngineLoadError as error:\n"
        "    print(error)\n"
        "engine.close()\n"
    )
    environ = environment()
    environ["PYTHONPATH"] += f":{lean()}:{ROOT / 'src'}"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tensorrt-lean 11.4.0.106 cannot run here: ")
    assert "CUDA initialization failure" in done.stdout


def lean() -> Path:
    """Return the folder of the lean runtime's wheels; skip without them, or fail under CI."""
    try:
        return once(f"tensorrt-lean-{sys.implementation.cache_tag}", _fetch_lean)
    except CannotBuildError as error:
        why = f"the lean runtime cannot be had here: {error}"
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)


def _fetch_lean(folder: Path) -> None:
    wheels = [f"tensorrt-lean-cu13-{part}==11.4.0.106" for part in ("bindings", "libs")]
    pip("download", "--no-deps", "--only-binary", ":all:", "-d", str(folder), *wheels)
    for path in folder.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder)
        path.unlink()


def _used() -> tuple[set[str], set[tuple[str, str]]]:
    """Return the attributes that the engine's code reads, and pairs of strings as ("BuilderFlag", "FP16")."""
    names: set[str] = set()
    pairs: set[tuple[str, str]] = set()
    for path in ENGINE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            if isinstance(node, ast.Call):
                strings = [
                    a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)
                ]
                names |= set(strings[:1])  # hasattr(engine, "…") and the like
                pairs |= {(strings[0], strings[1])} if len(strings) == 2 else set()
            if isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
                names |= {
                    a.value
                    for a in node.iter.elts
                    if isinstance(a, ast.Constant) and isinstance(a.value, str)
                }
    return names, pairs


def test_the_stand_ins_have_every_name_that_the_engine_uses() -> None:
    theirs = {
        name for version in HERE_ARE for cls in real(version).values() for name in cls.get("members", ())
    }
    ours: set[str] = {member for _, member, _, _ in versions._versioned}
    for name, cls in classes().items():
        ours |= set() if name in enumerations() else attributes(cls)
    # The engine defines callbacks itself; other public names may belong to any library.
    callbacks = {
        name for cls in ("IErrorRecorder", "IProgressMonitor") for name in real("11.4.0.106")[cls]["members"]
    }
    used = {name for name in _used()[0] if "_" in name and not name.startswith("_")}
    assert used & theirs - callbacks - ours == set()
    assert len(used & theirs) > 20


def test_every_enumerator_that_the_engine_looks_up_is_in_a_version() -> None:
    used = {pair for pair in _used()[1] if pair[0] in enumerations()}
    known = {
        (name, member)
        for version in HERE_ARE
        for name, cls in real(version).items()
        for member in cls.get("enum", ())
    }
    assert used <= known
    assert ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED") in used
