"""Check one value of the settings and say precisely why it is refused.

The structs in schema.py, padding.py and auth.py say what each value may be. The same types give the words of
a refusal, of `--help` and of docs/configuration.md.
"""

import difflib
import ipaddress
import reprlib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from cobatch.server.settings.describe import describe, extra_of


class SettingsError(Exception):
    """Settings are refused. Each message is one line: the key, what was expected, what came, its source."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class Errors:
    """Collect refusals, to report all of them: `with errors:` records a SettingsError and goes on."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, error: SettingsError) -> None:
        """Record a refusal."""
        self.messages += error.messages

    def __len__(self) -> int:
        return len(self.messages)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, SettingsError):
            self.add(error)
            return True
        return False

    def raise_any(self) -> None:
        """Raise SettingsError with all that was recorded, if anything was."""
        if self.messages:
            raise SettingsError(*self.messages)


class Given(NamedTuple):
    """A checked value with what a message needs: its key path and its source."""

    value: Any
    key: str
    source: str


Table = dict[str, Given]


def fields_of(struct: type[msgspec.Struct]) -> dict[str, Any]:
    """Return a struct's fields and their types, as `check_table` takes them."""
    return {field.name: field.type for field in msgspec.structs.fields(struct)}


def read_toml(path: Path, origin: str) -> dict[str, Any]:
    """Read a TOML file; `origin` says what named the file. Raises SettingsError."""
    try:
        return tomllib.loads(path.read_bytes().decode())
    except (OSError, ValueError) as error:
        match error:
            case OSError():
                why = f"cannot read {path}: {error.strerror}"
            case UnicodeDecodeError():
                why = f"{path} is not UTF-8: byte {error.start}"
            case _:
                why = f"{path} is not TOML: {error}"
        raise SettingsError(f"config: {why} ({origin})") from None


def check_table(
    where: str,
    table: object,
    fields: Mapping[str, Any],
    source: str,
    errors: Errors | None = None,
    hint: Callable[[str, Iterable[str]], str] | None = None,
) -> Table:
    """Check each key of a table of a file; return the values that pass.

    Refusals go to `errors`, or are raised together. `hint` ends the sentence about an unknown key.
    """
    found = Errors() if errors is None else errors
    checked: Table = {}
    with found:
        if not isinstance(table, dict):
            raise refused(where, "a table", table, source)
        for key, value in table.items():
            with found:
                if key not in fields:
                    instead = (hint or suggestion)(key, fields)
                    raise SettingsError(f"{where}.{key}: unknown key{instead} ({source})")
                checked[key] = check(f"{where}.{key}", value, fields[key], source)
    if errors is None:
        found.raise_any()
    return checked


def check(key: str, value: object, kind: Any, source: str, *, text: bool = False) -> Given:
    """Convert one value; `text`: it is a flag's or a variable's, to be read as a number, switch or list.

    Raises SettingsError.
    """
    # A list of numbers may be written 0,1 in a file too.
    split = isinstance(value, str) and "separator" in extra_of(inspect.type_info(kind))
    given = str(value).split(",") if split else value
    try:
        return Given(msgspec.convert(given, kind, strict=not (text or split)), key, source)
    except msgspec.ValidationError:
        expected = describe(inspect.type_info(kind), "a list with commas" if split else "an array")
        raise refused(key, expected, value, source, text=text) from None


def refused(key: str, expected: str, value: object, source: str, *, text: bool = False) -> SettingsError:
    """Return the refusal of a value; the caller raises it."""
    # Variables and flags are always text; only for a file is the type worth saying.
    came = reprlib.repr(value) if text else _describe_value(value)
    return SettingsError(f"{key}: expected {expected}, got {came} ({source})")


def values_of(table: Table) -> dict[str, Any]:
    """Return the values alone."""
    return {name: given.value for name, given in table.items()}


def suggestion(key: str, known: Iterable[str]) -> str:
    """Return `; did you mean KNOWN?` for the nearest known key, or "" if none is near."""
    near = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def is_loopback(host: str) -> bool:
    """Return True if only this machine can reach `host`, an address or `localhost`."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _describe_value(value: object) -> str:
    """Show a value as it came, short enough for one line."""
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
