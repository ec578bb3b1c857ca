"""The tables [[models.pad]]: which axes may be padded. What they say of the model itself is checked when
it is loaded (`server.inference.padding`)."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from cobatch.server.settings.values import (
    Given,
    SettingsError,
    Table,
    check_table,
    fields_of,
    refused,
    values_of,
)

LARGEST = 2**31 - 1
Text = Annotated[str, Meta(min_length=1)]
Axis = Annotated[int, Meta(ge=0, le=31)]
Size = Annotated[int, Meta(ge=1, le=LARGEST)]
Value = bool | int | float | str


class PadSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An axis of an input. Axes are those of a row: 0 is the one behind the batch axis."""

    input: Annotated[Text, Meta(description="the input's name")]
    axis: Annotated[Axis, Meta(description="which axis of its rows may be padded")] = 0
    value: Annotated[Value | None, Meta(description="what it is padded with (default: 0, false or '')")] = (
        None
    )
    same_length_as: Annotated[
        Text | None, Meta(description="the input of another table, whose length and buckets this one shares")
    ] = None
    mask: Annotated[
        Text | None, Meta(description="an input that is 1 where rows have elements and 0 where padding is")
    ] = None
    buckets: Annotated[tuple[Size, ...], Meta(description="lengths to pad to (default: powers of two)")] = ()
    max: Annotated[Size | None, Meta(description="the longest, where buckets are powers of two")] = None
    outputs: Annotated[
        dict[str, Axis | tuple[Axis, ...]],
        Meta(description="outputs that are as long as the input, and along which axis of their rows"),
    ] = {}


# A value may be of any of four types; each is looked at with the input's datatype, at load.
_FIELDS: dict[str, Any] = fields_of(PadSettings) | {"value": Any}


def read_pad(listed: object, where: str, source: str) -> tuple[PadSettings, ...]:
    """The tables of one model, from the file's; raises SettingsError. `where`: their key path."""
    if not isinstance(listed, list):
        raise refused(where, "an array of tables, written [[models.pad]]", listed, source)
    tables = [
        check_table(f"{where}[{number}]", table, _FIELDS, source) for number, table in enumerate(listed)
    ]
    for number, table in enumerate(tables):
        if "input" not in table:
            expected = "missing; expected the name of the input that may be padded"
            raise SettingsError(f"{where}[{number}].input: {expected} ({source})")
        _check_one(table)
    _check_all(tables, where, source)
    return tuple(msgspec.convert(values_of(table), PadSettings) for table in tables)


def _check_one(table: Table) -> None:
    given = table.get("value")
    if given is not None and not isinstance(given.value, Value):
        raise refused(given.key, "a number, true, false or text", given.value, given.source)
    if "same_length_as" in table:
        for name in ("mask", "buckets", "max"):
            if name in table:
                raise _error(table[name], "belongs into the table of the input that has the length")
    buckets = table.get("buckets")
    if buckets is None:
        return
    if "max" in table:
        raise _error(table["max"], "not together with buckets, whose last one is the longest")
    if not buckets.value or list(buckets.value) != sorted(set(buckets.value)):
        raise _error(buckets, "expected one or more lengths, each larger than the one before")


def _check_all(tables: list[Table], where: str, source: str) -> None:
    """What the tables of one model say together."""
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
            what = "two" if shared.value in leaders else "no"
            raise _error(shared, f"{what} tables that have a length of their own are for {shared.value!r}")
    for number, mask in enumerate(masks):
        if mask.value in {name for name, _ in padded} or mask.value in [one.value for one in masks[:number]]:
            raise _error(mask, f"{mask.value!r} is in another table already, or another length's mask")


def _error(given: Given, why: str) -> SettingsError:
    return SettingsError(f"{given.key}: {why} ({given.source})")
