"""`[[models.pad]]`: which axes may be padded.

What these tables say about the model itself is checked when it is loaded (`server.inference.padding`).
"""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from cobatch.server.settings.describe import about
from cobatch.server.settings.values import (
    Errors,
    Given,
    SettingsError,
    Table,
    check_table,
    fields_of,
    refused,
    values_of,
)

Text = Annotated[str, Meta(min_length=1)]
Axis = Annotated[int, Meta(ge=0, le=31)]
Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Value = bool | int | float | str


class PadSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[models.pad]]`: an axis of an input. Axes are those of a row: 0 is the first after the batch axis."""

    input: Annotated[Text, about("name of the input")]
    axis: Annotated[Axis, about("axis of its rows that may be padded")] = 0
    value: Annotated[Value | None, about("value to pad with", default="0, false or ''")] = None
    same_length_as: Annotated[
        Text | None, about("input of another table, whose length and buckets this one shares")
    ] = None
    mask: Annotated[
        Text | None, about("input that the server fills: 1 where rows have elements, 0 where they are padded")
    ] = None
    buckets: Annotated[
        tuple[Size, ...], about("lengths to pad to, in ascending order", default="powers of two")
    ] = ()
    max: Annotated[Size | None, about("longest length, if buckets are powers of two")] = None
    outputs: Annotated[
        dict[str, Axis | tuple[Axis, ...]],
        about("outputs that are as long as the input, each with the axes of its rows"),
    ] = {}


# A value may be of any of four types; it is checked against the input's datatype when the model is loaded.
_FIELDS: dict[str, Any] = fields_of(PadSettings) | {"value": Any}


def read_pad(listed: object, where: str, source: str, errors: Errors) -> tuple[PadSettings, ...]:
    """Read the tables of one model, whose key path is `where`; () if one of them is refused."""
    before = len(errors)
    with errors:
        if not isinstance(listed, list):
            raise refused(where, "an array of tables, written [[models.pad]]", listed, source)
        tables = [
            _read_one(f"{where}[{number}]", table, source, errors) for number, table in enumerate(listed)
        ]
        if len(errors) == before:
            _check_all(tables, where, source)
            return tuple(msgspec.convert(values_of(table), PadSettings) for table in tables)
    return ()


def _read_one(where: str, listed: object, source: str, errors: Errors) -> Table:
    table = check_table(where, listed, _FIELDS, source, errors)
    with errors:
        if isinstance(listed, dict) and "input" not in listed:
            expected = "missing; expected the name of the input that may be padded"
            raise SettingsError(f"{where}.input: {expected} ({source})")
    with errors:
        _check_one(table)
    return table


def _check_one(table: Table) -> None:
    given = table.get("value")
    if given is not None and not isinstance(given.value, Value):
        raise refused(given.key, "a number, true, false or text", given.value, given.source)
    if "same_length_as" in table:
        for name in ("mask", "buckets", "max"):
            if name in table:
                raise _error(table[name], "belongs in the table of the input that has the length")
    buckets = table.get("buckets")
    if buckets is None:
        return
    if "max" in table:
        raise _error(table["max"], "not together with buckets, whose last one is the longest")
    if not buckets.value or list(buckets.value) != sorted(set(buckets.value)):
        raise _error(buckets, "expected one or more lengths, each larger than the one before")


def _check_all(tables: list[Table], where: str, source: str) -> None:
    """Check the tables of one model against each other."""
    leaders = [table["input"].value for table in tables if "same_length_as" not in table]
    masks = [table["mask"] for table in tables if "mask" in table]
    padded: set[tuple[str, int]] = set()
    for number, table in enumerate(tables):
        name, axis = table["input"].value, table["axis"].value if "axis" in table else 0
        if (name, axis) in padded:
            raise SettingsError(f"{where}[{number}]: axis {axis} of {name!r} is there twice ({source})")
        padded.add((name, axis))
        shared = table.get("same_length_as")
        if shared is not None and leaders.count(shared.value) != 1:
            count = "two" if shared.value in leaders else "no"
            raise _error(shared, f"{count} tables with a length of their own are for {shared.value!r}")
    for number, mask in enumerate(masks):
        if mask.value in {name for name, _ in padded} or mask.value in [one.value for one in masks[:number]]:
            raise _error(mask, f"{mask.value!r} is in another table already, or another length's mask")


def _error(given: Given, why: str) -> SettingsError:
    return SettingsError(f"{given.key}: {why} ({given.source})")
