"""`[[models.pad]]`: its values and every refusal; padding values in the input's datatype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cobatch.engines.base import TensorSpec
from cobatch.engines.errors import EngineLoadError
from cobatch.server.inference.padding import _powers, _value
from cobatch.server.settings.load import load_settings
from cobatch.server.settings.schema import PadSettings
from cobatch.server.settings.values import SettingsError
from tests.support.paths import ROOT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.onnx").write_bytes(b"")
    return tmp_path


def read(folder: Path, text: str) -> tuple[PadSettings, ...]:
    config = folder / "cobatch.toml"
    config.write_text('[[models]]\npath = "tiny.onnx"\n' + text)
    return load_settings(config, {}, {"max_batch_size": "4"}).models[0].pad


def table(text: str) -> str:
    return f"[[models.pad]]\n{text}\n"


IDS = 'input = "ids"\n'


def test_none_is_the_default(folder: Path) -> None:
    assert read(folder, "") == ()


def test_every_key_is_read(folder: Path) -> None:
    first = IDS + 'value = 1\nmask = "mask"\nbuckets = [16, 64]\noutputs = { hidden = 0, pairs = [0, 1] }'
    second = 'input = "types"\naxis = 1\nsame_length_as = "ids"\noutputs = { other = 2 }'
    third = 'input = "sound"\nmax = 1000\nvalue = -inf'
    assert read(folder, table(first) + table(second) + table(third)) == (
        PadSettings(
            input="ids", value=1, mask="mask", buckets=(16, 64), outputs={"hidden": 0, "pairs": (0, 1)}
        ),
        PadSettings(input="types", axis=1, same_length_as="ids", outputs={"other": 2}),
        PadSettings(input="sound", max=1000, value=float("-inf")),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pad = 3", "models[0].pad: expected an array of tables, written [[models.pad]], got 3"),
        ("pad = [3]", "models[0].pad[0]: expected a table, got 3"),
        (table("axis = 0"), "models[0].pad[0].input: missing; expected the input's name"),
        (table(IDS + "axes = 0"), "models[0].pad[0].axes: unknown key; did you mean axis?"),
        (table(IDS + "axis = -1"), "models[0].pad[0].axis: expected an integer from 0 to 31, got -1"),
        (
            table(IDS + "value = [0]"),
            "models[0].pad[0].value: expected true or false, an integer, a number or text, got",
        ),
        (
            table(IDS + "buckets = [0]"),
            "models[0].pad[0].buckets: expected an array of integers",
        ),
        (table(IDS + "buckets = []"), "models[0].pad[0].buckets: expected one or more lengths"),
        (table(IDS + "buckets = [8, 4]"), "models[0].pad[0].buckets: expected one or more lengths"),
        (table(IDS + "buckets = [4, 4]"), "models[0].pad[0].buckets: expected one or more lengths"),
        (table(IDS + "buckets = [4]\nmax = 4"), "models[0].pad[0].max: not together with buckets"),
        (table(IDS + 'outputs = ["y"]'), "models[0].pad[0].outputs: expected a table whose values are"),
        (table(IDS) + table(IDS), "models[0].pad[1]: axis 0 of 'ids' is there twice"),
        (
            table(IDS) + table('input = "b"\nsame_length_as = "c"'),
            "models[0].pad[1].same_length_as: no tables with a length of their own are for 'c'",
        ),
        (
            table(IDS) + table(IDS + "axis = 1") + table('input = "b"\nsame_length_as = "ids"'),
            "models[0].pad[2].same_length_as: two tables with a length of their own are for 'ids'",
        ),
        (
            table(IDS) + table('input = "b"\nsame_length_as = "ids"\nmax = 4'),
            "models[0].pad[1].max: belongs in the table of the input that has the length",
        ),
        (table(IDS + 'mask = "ids"'), "models[0].pad[0].mask: 'ids' is in another table already"),
        (
            table(IDS + 'mask = "m"') + table('input = "b"\nmask = "m"'),
            "models[0].pad[1].mask: 'm' is in another table already, or another length's mask",
        ),
    ],
)
def test_refused(folder: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(folder, text)
    assert message in str(caught.value)
    assert str(caught.value).endswith("cobatch.toml)")
    assert "\n" not in str(caught.value)


def test_no_flag_and_no_variable(folder: Path) -> None:
    with pytest.raises(SettingsError, match="COBATCH_PAD: unknown environment variable"):
        load_settings(None, {"COBATCH_PAD": "x"}, {"model": folder / "tiny.onnx"})


@pytest.mark.parametrize(
    ("most", "powers"), [(None, ()), (1, (1,)), (2, (1, 2)), (5, (1, 2, 4, 5)), (8, (1, 2, 4, 8))]
)
def test_powers(most: int | None, powers: tuple[int, ...]) -> None:
    assert _powers(most) == powers


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("INT8", None, 0),
        ("INT8", -128, -128),
        ("UINT8", 255, 255),
        ("BOOL", None, False),
        ("BOOL", True, True),
        ("BOOL", 1, True),
        ("FP16", -65504, -65504),
        ("FP32", float("inf"), float("inf")),
        ("FP64", 2, 2),
        ("BF16", 1, 0x3F80),
        ("BF16", 1.00390625, 0x3F80),  # half way between two numbers: to the even one
        ("BF16", 1.01171875, 0x3F82),
        ("BF16", -2.0, 0xC000),
        ("BYTES", None, b""),
        ("BYTES", "ä", "ä".encode()),
    ],
)
def test_values(datatype: str, value: Any, expected: Any) -> None:
    spec = TensorSpec("x", datatype, (-1,))
    found = _value("value", spec, value)
    assert found == expected
    if datatype != "BYTES":
        assert found.dtype == spec.dtype
        assert isinstance(found, np.generic)


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("INT8", 128), ("INT8", -129), ("INT8", 1.0), ("INT8", "1"), ("INT8", False), ("UINT8", -1),
        ("BOOL", 2), ("BOOL", "x"), ("FP16", 65520), ("FP32", 1e39), ("FP32", True), ("FP32", "1"),
        ("BF16", 3.4e38), ("BF16", False), ("BYTES", 0),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(datatype: str, value: Any) -> None:
    with pytest.raises(EngineLoadError, match=f"value: input 'x' is {datatype}, it cannot hold"):
        _value("value", TensorSpec("x", datatype, (-1,)), value)


def test_the_example_of_the_docs(folder: Path) -> None:
    text = (ROOT / "docs" / "padding.md").read_text()
    example = text.split("```toml\n")[1].split("```")[0]
    config = folder / "docs.toml"
    config.write_text(example.replace("encoder.onnx", "tiny.onnx"))
    ids, types = load_settings(config, {}, {}).models[0].pad
    assert (ids.mask, ids.outputs, types.same_length_as) == ("mask", {"tokens": 0}, "ids")
