"""One value of the settings: read, checked, and refused in words that say where it was written.

For the tables of server/settings/schema.py and server/settings/auth.py, whose structs say what each value may
be.
"""

import difflib
import reprlib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect


class SettingsError(Exception):
    """A setting is refused. The text is one line for a person: key, expected, what came, where from."""


class Given(NamedTuple):
    """A checked value with the places a message needs: its key path and its source."""

    value: Any
    key: str
    source: str


Table = dict[str, Given]


def fields_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """A struct's fields and their types, which `check_table` goes by."""
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


def read_toml(path: Path, origin: str) -> dict[str, Any]:
    """The document in a file; `origin` says who named the file."""
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise SettingsError(f"config: cannot read {path}: {error.strerror} ({origin})") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"config: {path} is not UTF-8: byte {error.start} ({origin})") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"config: {path} is not TOML: {error} ({origin})") from None


def check_table(
    where: str,
    table: object,
    fields: Mapping[str, Any],
    source: str,
    belongs: Callable[[str, Iterable[str]], str] | None = None,
) -> Table:
    """Check each key of a table of the file; `belongs` ends the sentence about an unknown key."""
    if not isinstance(table, dict):
        raise refused(where, "a table", table, source)
    checked: Table = {}
    for key, value in table.items():
        if key not in fields:
            instead = (belongs or suggestion)(key, fields)
            raise SettingsError(f"{where}.{key}: unknown key{instead} ({source})")
        checked[key] = check(f"{where}.{key}", value, fields[key], source)
    return checked


def check(key: str, value: object, kind: Any, source: str, *, text: bool = False) -> Given:
    """Convert one value; `text` says that it came as text and is to be read as a number or truth."""
    if kind is Path:
        return Given(value, key, source)
    try:
        return Given(msgspec.convert(value, kind, strict=not text), key, source)
    except msgspec.ValidationError:
        raise refused(key, _describe(inspect.type_info(kind)), value, source, text=text) from None


def refused(key: str, expected: str, value: object, source: str, *, text: bool = False) -> SettingsError:
    """What is wrong with a value; the caller raises it."""
    # Variables and flags are always text; only in a file is it news that a value is.
    came = reprlib.repr(value) if text else _describe_value(value)
    return SettingsError(f"{key}: expected {expected}, got {came} ({source})")


def values_of(table: Table) -> dict[str, Any]:
    """The values alone."""
    return {name: given.value for name, given in table.items()}


def _describe(info: inspect.Type) -> str:
    """What a value of this type looks like: `an integer from 1 to 65536`."""
    match info:
        case inspect.Metadata(type=inner):
            return _describe(inner)
        case inspect.UnionType(types=types):
            return " or ".join(_describe(one) for one in types if not isinstance(one, inspect.NoneType))
        case inspect.IntType() | inspect.FloatType():
            return f"{'an integer' if isinstance(info, inspect.IntType) else 'a number'} {_range(info)}"
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(sorted(str(value) for value in values))
        case inspect.StrType(pattern=str(), max_length=most):
            return f"1 to {most} letters, digits, '.', '_', '-', the first a letter or digit"
        case inspect.VarTupleType(item_type=item):
            return f"an array, each item of it {_describe(item)}"
        case inspect.DictType(value_type=value):
            return f"a table, each value of it {_describe(value)}"
        case _:
            return "text that is not empty"


def _range(info: inspect.IntType | inspect.FloatType) -> str:
    if info.gt is not None:
        return f"above {info.gt} and at most {info.le}"
    return f"from {info.ge} to {info.le}"


def _describe_value(value: object) -> str:
    """A value as it came, short enough for one line."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return f"the text {reprlib.repr(value)}"
        case dict():
            return "a table"
        case list():
            return "an array"
        case _:
            return reprlib.repr(value)


def suggestion(key: str, known: Iterable[str]) -> str:
    """`; did you mean KNOWN?` for the nearest known key, or nothing where none is near."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
