"""Describe settings in words: for refusals, `--help`, docs/configuration.md and the JSON schema."""

import re
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

import msgspec
from msgspec import Meta, inspect


class Setting(NamedTuple):
    """A field of a struct, as `--help` and the reference show it."""

    name: str
    type: str  # "an integer from 0 to 65535"
    default: Any  # msgspec.NODEFAULT if it must be given
    computed: str  # how an omitted value is computed; "" if `default` holds
    placeholder: str  # of its value in `--help`
    help: str
    is_switch: bool
    may_be_text: bool  # a list that may be written as text


def about(description: str, placeholder: str = "", *, default: str = "") -> Meta:
    """Describe a setting: its meaning, the placeholder of its value, and a default that is computed."""
    extra = {"placeholder": placeholder, "default": default}
    return Meta(description=description, extra={name: text for name, text in extra.items() if text})


def placeholder(text: str) -> Meta:
    """Name the placeholder of a type's values in `--help`."""
    return Meta(extra={"placeholder": text})


def pattern(expression: str, expected: str) -> Meta:
    """Restrict text to a regular expression, which refusals describe as `expected`."""
    return Meta(pattern=rf"^{expression}\Z", extra={"expected": expected})


Text = Annotated[str, Meta(min_length=1)]
# In a configuration file these are relative to its folder.
File = Annotated[Text, placeholder("FILE")]
Folder = Annotated[Text, placeholder("FOLDER")]


def settings_of(struct: type[msgspec.Struct]) -> dict[str, Setting]:
    """Return the settings that a struct declares, by name."""
    return {field.name: _setting(field) for field in msgspec.structs.fields(struct)}


def _setting(field: msgspec.structs.FieldInfo) -> Setting:
    info = inspect.type_info(field.type)
    extra = extra_of(info)
    kind = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
    choices = "|".join(get_args(kind)) if get_origin(kind) is Literal else ""
    schema = info.extra_json_schema if isinstance(info, inspect.Metadata) else None
    return Setting(
        name=field.name,
        type=describe(info),
        default=field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory(),
        computed=extra.get("default", ""),
        placeholder=extra.get("placeholder", choices),
        help=(schema or {}).get("description", ""),
        is_switch=kind is bool,
        may_be_text="separator" in extra,
    )


def describe(info: inspect.Type, array: str = "an array") -> str:
    """Describe a value of this type: `an integer from 1 to 65536`."""
    match info:
        case inspect.Metadata(type=inner, extra=extra):
            return (extra or {}).get("expected") or describe(inner, array)
        case inspect.UnionType(types=types):
            *first, last = [describe(one, array) for one in types if not isinstance(one, inspect.NoneType)]
            return f"{', '.join(first)} or {last}" if first else last
        case inspect.IntType() | inspect.FloatType():
            kind = "an integer" if isinstance(info, inspect.IntType) else "a number"
            if info.le is None:
                return kind
            limits = f"from {info.ge} to" if info.gt is None else f"above {info.gt} and at most"
            return f"{kind} {limits} {info.le}"
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType(values=values):
            return "one of " + ", ".join(sorted(str(value) for value in values))
        case inspect.VarTupleType(item_type=item):
            return f"{array} of {_plural(describe(item))}"
        case inspect.DictType(value_type=value):
            return f"a table whose values are {_plural(describe(value))}"
        case inspect.StructType():
            return "a table"
        case inspect.StrType(min_length=None):
            return "text"
        case _:
            return "text that is not empty"


def _plural(text: str) -> str:
    """Return a description in the plural: `an integer from 0 to 31 or an array` -> `integers ...`."""
    text = text.replace("one of ", "any of ")
    return re.sub(r"\ban? (integer|number|array|table)\b", r"\1s", text)


def extra_of(info: inspect.Type) -> dict[str, str]:
    """Return what `about` and the type's aliases say, merged; the outermost wins."""
    match info:
        case inspect.Metadata(type=inner, extra=extra):
            return extra_of(inner) | (extra or {})
        case inspect.UnionType(types=types):
            return {name: text for one in types for name, text in extra_of(one).items()}
        case inspect.VarTupleType(item_type=item):
            return extra_of(item)
        case _:
            return {}


def tables_in(info: inspect.Type) -> tuple[type[msgspec.Struct], bool] | None:
    """Return the struct that a type's values are tables of, and True if they are an array of them."""
    match info:
        case inspect.Metadata(type=inner):
            return tables_in(inner)
        case inspect.UnionType(types=types):
            return next(filter(None, map(tables_in, types)), None)
        case inspect.VarTupleType(item_type=inspect.StructType(cls=struct)):
            return struct, True
        case inspect.StructType(cls=struct):
            return struct, False
        case _:
            return None
