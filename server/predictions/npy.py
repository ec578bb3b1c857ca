"""Tensors in NumPy's .npy format -> payloads. Nothing is unpickled and nothing is executed.

The header is read by NumPy's own reader, which evaluates literals only, from a bounded number of bytes.
"""

import io
import tokenize
import warnings
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from cobatch.batcher.request import Payload
from cobatch.engines.base import DATATYPES, TensorSpec
from cobatch.server.v2.binary import check_bool
from cobatch.server.v2.checks import check_lengths, check_strings, check_tensor, wrong_data
from cobatch.server.v2.pieces import release

MAGIC = np.lib.format.MAGIC_PREFIX
# NumPy writes 64 or 128 bytes; a longer one than this is not the header of a tensor.
_MAX_HEADER_BYTES = 2048
_LAST_CODE = 0x10FFFF
_ELEMENTS_AT_ONCE = 1 << 12
_READERS: dict[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_UNREADABLE = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, MemoryError,
    RecursionError, tokenize.TokenError, Warning,
)  # fmt: skip
_NAMES = {dtype.name: name for name, dtype in DATATYPES.items() if name not in ("BF16", "BYTES")}
# float32, <f4 and f4, for example.
_ALIASES = {"bytes": "BYTES", "bfloat16": "BF16"} | {
    alias: datatype
    for name, datatype in _NAMES.items()
    for alias in (name, np.dtype(name).str, np.dtype(name).str[1:])
}


def datatype_of(name: str) -> str | None:
    """The V2 datatype of a V2 or NumPy name (float32, f4, <f4); None for an unknown name."""
    return name if name in DATATYPES else _ALIASES.get(name)


def read_npy(data: memoryview, spec: TensorSpec) -> tuple[list[int], Payload]:
    """The shape and payload of an input in a .npy file, checked against the signature. Raises Problem.

    Byte order and Fortran order are undone. Fixed-length byte strings and text become BYTES elements; as in
    NumPy, NULs at their ends are lost.
    """
    shape, fortran, dtype, rest = _header(data, spec)
    datatype = _NAMES.get(dtype.name, "BYTES" if dtype.kind in "SU" and dtype.itemsize else dtype.name)
    check_tensor(spec, datatype, shape)
    expected = prod(shape) * dtype.itemsize
    if len(rest) != expected:
        detail = f"shape {shape} of {dtype.name} takes {expected} bytes, the .npy file has {len(rest)}"
        raise wrong_data(spec, detail, expected_bytes=expected, actual_bytes=len(rest))
    if not expected:
        return shape, [] if datatype == "BYTES" else b""
    array = np.frombuffer(rest, dtype)
    if fortran:
        array = np.ascontiguousarray(array.reshape(shape[::-1]).T).reshape(-1)
    if datatype == "BYTES":
        check_strings(spec, array.size)
        check_lengths(spec, 1, [dtype.itemsize // (4 if dtype.kind == "U" else 1)])  # before one is copied
        return shape, _elements(array, spec)
    check_bool(spec, rest)
    little = array.astype(dtype.newbyteorder("<"), copy=False)
    return shape, little.data.cast("B")


def _header(data: memoryview, spec: TensorSpec) -> tuple[list[int], bool, np.dtype[Any], memoryview]:
    head = io.BytesIO(bytes(data[: _MAX_HEADER_BYTES + 12]))
    try:
        version = np.lib.format.read_magic(head)
        if version not in _READERS:
            raise ValueError(f"version {version} is not supported")
        with warnings.catch_warnings():
            # For example on headers that only Python 2 wrote.
            warnings.simplefilter("error")
            shape, fortran, dtype = _READERS[version](head, max_header_size=_MAX_HEADER_BYTES)
    except _UNREADABLE as error:
        raise wrong_data(spec, f"the .npy header cannot be read: {str(error)[:200]}") from None
    return [int(size) for size in shape], fortran, dtype, data[head.tell() :]


def _elements(array: np.ndarray[Any, Any], spec: TensorSpec) -> list[bytes]:
    if array.dtype.kind == "U":
        native = array.astype(array.dtype.newbyteorder("="), copy=False)
        codes = native.view(np.uint32)
        # NumPy makes text of any 32 bits: text beyond Unicode breaks its own methods.
        if codes.max() > _LAST_CODE or ((codes >= 0xD800) & (codes <= 0xDFFF)).any():
            raise wrong_data(spec, "the .npy file's text is not Unicode")
        array = native
    values: list[bytes] = []
    for at in range(0, array.size, _ELEMENTS_AT_ONCE):
        some = array[at : at + _ELEMENTS_AT_ONCE].tolist()
        values += some if array.dtype.kind == "S" else [value.encode() for value in some]
        release()
    return values
