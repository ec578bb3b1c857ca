"""`[[models.pad]]`: which axes may be padded.

What these tables say about the model itself is checked when it is loaded (`server.inference.padding`).
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from cobatch.server.settings.describe import Text, about
from cobatch.server.settings.values import SettingsError, Table

Axis = Annotated[int, Meta(ge=0, le=31)]
Size = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Value = bool | int | float | str


class PadSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[models.pad]]`: an axis of an input. Axes are those of a row: 0 is the first after the batch axis."""

    input: Annotated[Text, about("the input's name")]
    axis: Annotated[Axis, about("axis of its rows that may be padded")] = 0
    value: Annotated[Value | None, about("value to pad with", default="0, false or ''")] = None
    same_length_as: Annotated[
        Text | None, about("input of another table, whose length and buckets this one shares")
    ] = None
    mask: Annotated[Text | None, about("input that the server fills: 1 for elements, 0 for padding")] = None
    buckets: Annotated[
        tuple[Size, ...], about("lengths to pad to, in ascending order", default="powers of two")
    ] = ()
    max: Annotated[Size | None, about("longest length, if buckets are powers of two")] = None
    outputs: Annotated[
        dict[str, Axis | tuple[Axis, ...]],
        about("outputs that are as long as the input, each with the axes of its rows"),
    ] = {}


def check_pads(tables: list[Table]) -> None:
    """Check the tables of one model by themselves and against each other. Raises SettingsError."""
    for table in tables:
        for name in ("mask", "buckets", "max"):
            if "same_length_as" in table and name in table:
                raise table[name].refused("belongs in the table of the input that has the length")
        if "buckets" in table and "max" in table:
            raise table["max"].refused("not together with buckets, whose last one is the longest")
        sizes = list(table["buckets"].value) if "buckets" in table else [1]
        if not sizes or sizes != sorted(set(sizes)):
            raise table["buckets"].refused("expected one or more lengths, each larger than the one before")
    leaders = [table["input"].value for table in tables if "same_length_as" not in table]
    masks: list[str] = []
    padded: set[tuple[str, int]] = set()
    for table in tables:
        name, axis = table["input"].value, table["axis"].value if "axis" in table else 0
        if (name, axis) in padded:
            _, key, source = table["input"]
            where = key.removesuffix(".input")
            raise SettingsError(f"{where}: axis {axis} of {name!r} is there twice ({source})")
        padded.add((name, axis))
        shared = table.get("same_length_as")
        if shared is not None and leaders.count(shared.value) != 1:
            count = "two" if shared.value in leaders else "no"
            raise shared.refused(f"{count} tables with a length of their own are for {shared.value!r}")
    for mask in [table["mask"] for table in tables if "mask" in table]:
        if mask.value in masks or any(mask.value == name for name, _ in padded):
            raise mask.refused(f"{mask.value!r} is in another table already, or another length's mask")
        masks.append(mask.value)
