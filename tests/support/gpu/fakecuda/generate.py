"""Generate a part of the fake driver from CUDA's headers: every entry point that `cuda.h` declares.

Functions that the C files define as `fake_<name>` get an entry point that calls them, between `fake_enter`
and `fake_leave`; all other entry points return an error and report a broken rule. `cuGetProcAddress`, which
cuda-bindings looks up all functions with, finds a name by the requested version of CUDA.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

_PROTOTYPE = re.compile(r"\bCUresult\s+(cu\w+)\s*\(([^;]*?)\)\s*;", re.DOTALL)
_WRITTEN = re.compile(r"^CUresult fake_(cu\w+|enqueueV3)\(([^{]*?)\) \{", re.MULTILINE | re.DOTALL)
_VERSIONED = re.compile(r"\(CUDAAPI \*PFN_(cu\w+?)_v(\d+)\)\(")
_SUFFIX = re.compile(r"(.*?)(?:_v(\d+))?\Z")

_ANYWHERE = re.compile(
    r"cu(Init|DriverGetVersion|Device\w+|GetError\w+|GetProcAddress\w*|CtxCreate\w*|CtxDestroy\w*|CtxDetach"
    r"|CtxPushCurrent\w*|CtxPopCurrent\w*|CtxSetCurrent|CtxGetCurrent|CtxGetApiVersion|CtxAttach)\Z"
)
# Calls that closing makes: an unusable context returns its error for them, and that breaks no rule.
_CLEANS_UP = re.compile(r"cu(MemFree\w*|MemHostUnregister|\w+Destroy\w*|ModuleUnload|StreamEndCapture)\Z")
# Calls that would wait or allocate while their thread captures a stream.
_UNSAFE = re.compile(
    r"cu(MemAlloc\w*|MemHostAlloc|MemHostRegister\w*|MemFree(_v2|Host)?|Memcpy\w+(?<!Async)_v2|MemsetD\w+(?<!Async)_v2"
    r"|CtxSynchronize)\Z"
)


def generate(include: Path, sources: list[Path]) -> str:
    """Return the C source. `include`: the folder with cuda.h and cudaTypedefs.h."""
    header = _preprocessed(include)
    declared = dict.fromkeys(name for name, _ in _PROTOTYPE.findall(header))
    written = dict(match for path in sources for match in _WRITTEN.findall(path.read_text()))
    unknown = [name for name in written if name not in declared and name != "enqueueV3"]
    if unknown:
        raise ValueError(f"cuda.h declares no {', '.join(unknown)}")
    names = [*declared, "enqueueV3"]
    skipped = {"cuGetProcAddress", "cuGetProcAddress_v2", "cuGetErrorString", "cuGetErrorName"}
    entries = [
        _entry(number, name, written.get(name)) for number, name in enumerate(names) if name not in skipped
    ]
    return "\n".join(
        [_HEAD, _tables(names), *entries, _words(header), _addresses(include, list(declared)), ""]
    )


_HEAD = """#include "fake.h"
CUresult fake_unknown(int call);
"""


def _preprocessed(include: Path) -> str:
    # Makes the header declare every version of every call.
    command = ["gcc", "-E", "-P", "-D__CUDA_API_VERSION_INTERNAL", f"-I{include}", "-x", "c", "-"]
    headers = "#include <cuda.h>\n#include <cudaProfiler.h>\n"  # the second for PyCUDA
    return subprocess.run(command, input=headers, capture_output=True, text=True, check=True).stdout


def _needs(name: str) -> str:
    if _ANYWHERE.match(name):
        return "NOTHING"
    flags = ["NEEDS_CONTEXT"]
    flags += ["CLEANS_UP"] if _CLEANS_UP.match(name) else []
    flags += ["UNSAFE_IN_CAPTURE"] if _UNSAFE.match(name) else []
    return " | ".join(flags)


def _tables(names: list[str]) -> str:
    listed = "".join(f'    "{name}",\n' for name in names)
    needs = "".join(f"    {_needs(name)},\n" for name in names)
    return (
        f"const int fake_call_count = {len(names)};\n"
        f"const char *const fake_names[] = {{\n{listed}}};\n"
        f"const unsigned char fake_needs[] = {{\n{needs}}};\n"
    )


def _entry(number: int, name: str, parameters: str | None) -> str:
    if parameters is None:
        # Without parameters: in C's calling convention the caller cleans up the arguments.
        alias = f"fake_none_{number}"
        return (
            f'CUresult {alias}(void) __asm__("{name}");\n'
            f"CUresult {alias}(void) {{ return fake_unknown({number}); }}"
        )
    given = "" if parameters == "void" else ", ".join(map(_name_of, _split(parameters)))
    return (
        f"CUresult fake_{name}({parameters});\n"
        f"CUresult {name}({parameters}) {{\n"
        f"    CUresult result = fake_enter({number});\n"
        f"    if (!result) result = fake_{name}({given});\n"
        f"    return fake_leave({number}, result);\n}}"
    )


def _split(parameters: str) -> list[str]:
    return [part.strip() for part in re.split(r",(?![^(]*\))", parameters)]


def _name_of(parameter: str) -> str:
    pointer = re.search(r"\(\*(\w+)\)", parameter)
    return pointer[1] if pointer else re.findall(r"\w+", parameter)[-1]


def _words(header: str) -> str:
    """Return cuGetErrorName and cuGetErrorString."""
    errors = dict.fromkeys(re.findall(r"\b(CUDA_(?:SUCCESS|ERROR_\w+))\s*=\s*\d+", header))
    names = "".join(f'    case {name}: *text = "{name}"; break;\n' for name in errors)
    words = "".join(f'    case {name}: *text = "{_text(name)}"; break;\n' for name in errors)
    wrong = (
        "    default: *text = NULL; return CUDA_ERROR_INVALID_VALUE;\n    }\n    return CUDA_SUCCESS;\n}\n"
    )
    return (
        f"CUresult cuGetErrorName(CUresult code, const char **text) {{\n"
        f"    switch (code) {{\n{names}{wrong}"
        f"CUresult cuGetErrorString(CUresult code, const char **text) {{\n"
        f"    switch (code) {{\n{words}{wrong}"
    )


# Error texts of the driver that are not the enumerator's name in lower case.
_DRIVER_WORDS = {
    "CUDA_SUCCESS": "no error",
    "CUDA_ERROR_INVALID_VALUE": "invalid argument",
    "CUDA_ERROR_NOT_INITIALIZED": "initialization error",
    "CUDA_ERROR_NO_DEVICE": "no CUDA-capable device is detected",
    "CUDA_ERROR_INVALID_DEVICE": "invalid device ordinal",
    "CUDA_ERROR_INVALID_CONTEXT": "invalid device context",
    "CUDA_ERROR_CONTEXT_IS_DESTROYED": "context is destroyed",
    "CUDA_ERROR_INVALID_HANDLE": "invalid resource handle",
    "CUDA_ERROR_NOT_READY": "device not ready",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "an illegal memory access was encountered",
    "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES": "too many resources requested for launch",
    "CUDA_ERROR_LAUNCH_TIMEOUT": "the launch timed out and was terminated",
    "CUDA_ERROR_ASSERT": "device-side assert triggered",
    "CUDA_ERROR_HARDWARE_STACK_ERROR": "hardware stack error",
    "CUDA_ERROR_ILLEGAL_INSTRUCTION": "an illegal instruction was encountered",
    "CUDA_ERROR_MISALIGNED_ADDRESS": "misaligned address",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE": "operation not supported on global/shared address space",
    "CUDA_ERROR_INVALID_PC": "invalid program counter",
    "CUDA_ERROR_LAUNCH_FAILED": "unspecified launch failure",
    "CUDA_ERROR_ECC_UNCORRECTABLE": "uncorrectable ECC error encountered",
    "CUDA_ERROR_NOT_SUPPORTED": "operation not supported",
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "operation not permitted when stream is capturing",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "operation failed due to a previous error during capture",
    "CUDA_ERROR_CAPTURED_EVENT": "operation not permitted on an event last recorded in a capturing stream",
}


def _text(name: str) -> str:
    return _DRIVER_WORDS.get(name, name.removeprefix("CUDA_ERROR_").lower().replace("_", " "))


def _addresses(include: Path, declared: list[str]) -> str:
    """Return cuGetProcAddress, which finds a name's newest version up to the requested one."""
    versions: dict[str, set[int]] = defaultdict(set)
    for name, version in _VERSIONED.findall((include / "cudaTypedefs.h").read_text()):
        versions[name].add(int(version))
    forms: dict[str, list[str]] = defaultdict(list)
    for symbol in sorted(declared, key=lambda name: int(_suffix(name)[1])):
        forms[_suffix(symbol)[0]].append(symbol)
    rows = []
    for name, symbols in forms.items():
        since = sorted(versions.get(name, ()))
        since = since[-len(symbols) :] if len(since) >= len(symbols) else [0] * len(symbols)
        rows += [
            f'    {{"{name}", {first}, "{symbol}"}},\n' for first, symbol in zip(since, symbols, strict=True)
        ]
    return _FIND.replace("ROWS", "".join(rows))


def _suffix(symbol: str) -> tuple[str, str]:
    match = _SUFFIX.match(symbol)
    assert match is not None
    return match[1], match[2] or "1"


_FIND = """
#define _GNU_SOURCE
#include <dlfcn.h>
static const struct { const char *name; int since; const char *symbol; } forms[] = {
ROWS};

static void *own(const char *symbol) {
    static void *self = NULL;
    if (!self) self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    return dlsym(self, symbol);
}

CUresult cuGetProcAddress_v2(const char *name, void **address, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
    const char *best = NULL;
    int since = -1, known = 0;
    (void)flags;
    for (unsigned i = 0; i < sizeof forms / sizeof *forms; i++) {
        if (strcmp(forms[i].name, name) != 0) continue;
        known = 1;
        if (forms[i].since > version || forms[i].since < since) continue;
        best = forms[i].symbol;
        since = forms[i].since;
    }
    *address = best ? own(best) : NULL;
    if (status)
        *status = *address ? CU_GET_PROC_ADDRESS_SUCCESS
                  : known  ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                           : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *address ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

CUresult cuGetProcAddress(const char *name, void **address, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(name, address, version, flags, NULL);
}
"""
