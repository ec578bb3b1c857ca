"""Check values of the settings one by one, and say precisely why one is refused.

The types in schema.py and auth.py limit each value, and give the words of a refusal, of `--help` and of
docs/configuration.md (describe.py).
"""

import difflib
import ipaddress
import re
import reprlib
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from cobatch.server.settings.describe import describe, extra_of, settings_of, tables_in


class SettingsError(Exception):
    """Settings are refused. Each message is one line: the key, the expectation, the value, its source."""

    def __init__(self, *messages: str) -> None:
        super().__init__("\n".join(messages))
        self.messages = messages


class Errors(list[str]):
    """Messages of all refusals: `with errors:` records a SettingsError and goes on."""

    def under(self, key: str) -> bool:
        """Return True if a value under this key path was refused."""
        return any(message.startswith(key) for message in self)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, SettingsError):
            self += error.messages
            return True
        return False

    def raise_any(self) -> None:
        """Raise SettingsError with all that was recorded, if anything was."""
        if self:
            raise SettingsError(*self)


class Given(NamedTuple):
    """A checked value with its key path and source, for messages."""

    value: Any
    key: str
    source: str

    def refused(self, why: str) -> SettingsError:
        """Return the refusal of the value; the caller raises it."""
        return SettingsError(f"{self.key}: {why} ({self.source})")

    def unexpected(self, expected: str, *, text: bool = False) -> SettingsError:
        """Return the refusal with the expectation and the value."""
        return SettingsError(f"{unexpected(self.key, expected, self.value, text=text)} ({self.source})")


Table = dict[str, Given]
Hint = Callable[[str, Iterable[str]], str]


class Reader:
    """Read the tables of a file by their structs; refused values are left out, and go to `errors`.

    Names of files are relative to `folder`. `hint` ends the sentence about an unknown key.
    """

    def __init__(self, source: str, folder: Path, errors: Errors, hint: Hint | None = None) -> None:
        self.source = source
        self.errors = errors
        self._folder = folder
        self._hint = hint or suggestion

    def table(self, where: str, table: object, struct: type[msgspec.Struct]) -> Table:
        """Read a table; arrays of tables become lists, without the tables that lack a required value."""
        fields = {field.name: field.type for field in msgspec.structs.fields(struct)}
        checked: Table = {}
        with self.errors:
            if not isinstance(table, dict):
                raise Given(table, where, self.source).unexpected("a table")
            for name, value in table.items():
                key = f"{where}.{name}" if where else name
                with self.errors:
                    if name not in fields:
                        raise SettingsError(f"{key}: unknown key{self._hint(name, fields)} ({self.source})")
                    checked[name] = self._value(key, value, fields[name])
            for name in _missing(struct, table):
                expected = settings_of(struct)[name].help
                missing = f"missing; expected {expected}" if expected else "missing"
                self.errors.append(f"{where}.{name}: {missing} ({self.source})")
        return checked

    def _value(self, key: str, value: object, kind: Any) -> Given:
        info = inspect.type_info(kind)
        found = tables_in(info)
        if found is None:
            given = check(key, value, kind, self.source)
            # The types File and Folder of describe.py.
            if extra_of(info).get("placeholder") not in ("FILE", "FOLDER"):
                return given
            if isinstance(given.value, str):
                return given._replace(value=str(self._folder / given.value))
            return given._replace(value=tuple(str(self._folder / name) for name in given.value))
        struct, is_array = found
        if not is_array:
            return Given(self.table(key, value, struct), key, self.source)
        if not isinstance(value, list):
            written = re.sub(r"\[\d+\]", "", key)
            raise Given(value, key, self.source).unexpected(f"an array of tables, written [[{written}]]")
        tables = [self.table(f"{key}[{index}]", one, struct) for index, one in enumerate(value)]
        complete = [table for table in tables if not _missing(struct, table)]
        return Given(complete, key, self.source)


def _missing(struct: type[msgspec.Struct], table: Mapping[str, object]) -> list[str]:
    """Return the required settings that are missing; of those of which one is enough, the first."""
    missing = [
        field.name for field in msgspec.structs.fields(struct) if field.required and field.name not in table
    ]
    one_of: tuple[str, ...] = getattr(struct, "ONE_OF", ())
    return missing + list(one_of[:1] if table.keys().isdisjoint(one_of) else ())


def read_toml(path: Path, key: str, source: str = "") -> dict[str, Any]:
    """Read the TOML file that the setting `key` names. Raises SettingsError."""
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        why = f"cannot read {path}: {error.strerror}"
    except UnicodeDecodeError as error:
        why = f"{path} is not UTF-8: byte {error.start}"
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        why = f"{path} is not TOML: {error}"
    raise SettingsError(f"{key}: {why} ({source})" if source else f"{key}: {why}")


def check(key: str, value: object, kind: Any, source: str, *, text: bool = False) -> Given:
    """Convert one value, of a flag or variable if `text`. Raises SettingsError."""
    info = inspect.type_info(kind)
    # Some lists may be written as text in a file too: 0,1.
    separator = extra_of(info).get("separator") if isinstance(value, str) else None
    given = str(value).split(separator) if separator else value if separator is None else [value]
    try:
        return Given(msgspec.convert(given, kind, strict=not text and separator is None), key, source)
    except msgspec.ValidationError:
        expected = describe(info, "a comma-separated list" if separator else "an array")
        raise Given(value, key, source).unexpected(expected, text=text) from None


def unexpected(key: str, expected: str, value: object, *, text: bool = False) -> str:
    """Describe expectation and value, short enough for one line."""
    shown = reprlib.repr(value)
    # Variables and flags are always text; only for a file is the type worth saying.
    if isinstance(value, dict | list):
        shown = "a table" if isinstance(value, dict) else "an array"
    elif isinstance(value, bool):
        shown = str(value).lower()
    elif isinstance(value, str) and not text:
        shown = f"the text {shown}"
    return f"{key}: expected {expected}, got {shown}"


def values_of(table: Table) -> dict[str, Any]:
    """Return the values alone, with those of its arrays of tables."""
    return {
        name: [values_of(one) for one in given.value] if isinstance(given.value, list) else given.value
        for name, given in table.items()
    }


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
