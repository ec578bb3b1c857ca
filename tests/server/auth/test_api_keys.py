"""API keys: the file format, the lookup, and the equal cost of a hit and a miss."""

import hashlib
import hmac
import math
import tomllib
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.server.auth.api_keys import ApiKeys, mint, toml_string
from cobatch.server.settings.values import SettingsError

ID = "ab2cd3ef4gh5"
SECRET = "s" * 43
KEY = f"cb_{ID}_{SECRET}"
SHA256 = hashlib.sha256(SECRET.encode()).hexdigest()
ENTRY: dict[str, Any] = {"id": ID, "sha256": SHA256, "tenant": "t", "scopes": ["infer"]}


def keys_of(*entries: dict[str, Any]) -> ApiKeys:
    return ApiKeys.parse({"keys": list(entries)}, "file x")


def test_a_key_finds_its_entry(tmp_path: Path) -> None:
    path = tmp_path / "api-keys.toml"
    key, text = mint("search-team", ["infer", "gold"], "a job")
    other, more = mint("b", ["admin"])
    path.write_text(f"{text}\n{more}")
    keys = ApiKeys.read(path)
    assert len(keys) == 2
    found = keys.find(key, 0.0)
    assert found is not None
    assert (found.tenant, found.scopes, found.expires_s) == ("search-team", ("infer", "gold"), math.inf)
    assert key.startswith(f"cb_{found.id}_")
    second = keys.find(other, 0.0)
    assert second is not None
    assert second.tenant == "b"


def test_the_file_does_not_contain_the_secret() -> None:
    key, text = mint("t", ["infer"])
    secret = key.split("_", 2)[2]
    assert len(secret) == 43
    assert secret not in text
    assert hashlib.sha256(secret.encode()).hexdigest() in text


def test_each_key_is_new() -> None:
    minted = [mint("t", ["infer"])[0] for _ in range(50)]
    assert len({key.split("_", 2)[1] for key in minted}) == 50
    assert len({key.split("_", 2)[2] for key in minted}) == 50


@pytest.mark.parametrize(
    "presented",
    [
        "",
        "cb_",
        KEY[:-1],
        KEY + "s",
        KEY + "\n",
        KEY.upper(),
        f" {KEY}",
        f"cb_{ID}_{'t' * 43}",
        f"cb_{ID}_{'_' * 43}",
        f"cb_zzzzzzzzzzzz_{SECRET}",
        f"cb__{SECRET}",
        f"{ID}_{SECRET}",
        f"cb_{ID}_{SHA256}",
        f"cb_{ID}_{chr(0x17F) * 43}",
        f"cb_{ID}_{'é' * 43}",
        "\x00" * 59,
        "\ud800",
        "x" * 100_000,
    ],
)
def test_any_other_text_finds_no_entry(presented: str) -> None:
    keys = keys_of(ENTRY)
    assert keys.find(KEY, 0.0) is not None
    assert keys.find(presented, 0.0) is None


@given(st.text() | st.from_regex(r"cb_[a-z2-7]{12}_[A-Za-z0-9_-]{43}", fullmatch=True))
def test_random_text_finds_no_entry(presented: str) -> None:
    assert keys_of(ENTRY).find(presented, 0.0) is None


def test_an_empty_file_finds_no_entry() -> None:
    keys = ApiKeys.parse({}, "file x")
    assert len(keys) == 0
    assert keys.find(KEY, 0.0) is None


def test_the_placeholder_secret_matches_no_key() -> None:
    # An unknown ID is compared with a digest of zeros, and a malformed key is hashed as this secret.
    assert keys_of().find(f"cb_{ID}_{'_' * 43}", -math.inf) is None


@pytest.mark.parametrize(
    "presented", [KEY, f"cb_{ID}_{'t' * 43}", f"cb_zzzzzzzzzzzz_{SECRET}", "", "x" * 9999]
)
def test_every_lookup_costs_one_digest_and_one_constant_time_comparison(
    presented: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    compared: list[tuple[int, int]] = []
    sha256, compare = hashlib.sha256, hmac.compare_digest

    def counting_sha256(data: bytes) -> Any:
        hashed.append(len(data))
        return sha256(data)

    def counting_compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return compare(one, other)

    keys = keys_of(ENTRY)
    monkeypatch.setattr("cobatch.server.auth.api_keys.hashlib.sha256", counting_sha256)
    monkeypatch.setattr("cobatch.server.auth.api_keys.hmac.compare_digest", counting_compare)
    keys.find(presented, 0.0)
    assert hashed == [43]
    assert compared == [(32, 32)]


@pytest.mark.parametrize(
    ("written", "expires"),
    [
        ("2027-01-31", datetime(2027, 1, 31, tzinfo=UTC)),
        ("2027-01-31T12:00:00", datetime(2027, 1, 31, 12, tzinfo=UTC)),
        ("2027-01-31T12:00:00Z", datetime(2027, 1, 31, 12, tzinfo=UTC)),
        ("2027-01-31 12:00:00+02:00", datetime(2027, 1, 31, 10, tzinfo=UTC)),
    ],
)
def test_an_expired_key_is_refused(written: str, expires: datetime) -> None:
    keys = keys_of(ENTRY | tomllib.loads(f"expires = {written}"))
    end_s = expires.timestamp()
    found = keys.find(KEY, end_s - 0.001)
    assert found is not None
    assert found.expires_s == end_s
    assert keys.find(KEY, end_s) is None


@pytest.mark.parametrize("expires", [date(2027, 1, 31), datetime(2027, 1, 31, 5, 6, 7, tzinfo=UTC)])
def test_mint_writes_the_expiry(expires: date) -> None:
    key, text = mint("t", ["infer"], expires=expires)
    found = ApiKeys.parse(tomllib.loads(text), "minted").find(key, 0.0)
    assert found is not None
    moment = expires if isinstance(expires, datetime) else datetime(2027, 1, 31, tzinfo=UTC)
    assert found.expires_s == moment.timestamp()


EACH = "a date or a date with a time, without quotes: 2027-01-31T12:00:00Z"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "keys[0].id: missing (file x)"),
        ({"sha256": None}, "keys[0].sha256: missing (file x)"),
        ({"tenant": None}, "keys[0].tenant: missing (file x)"),
        ({"scopes": None}, "keys[0].scopes: missing (file x)"),
        (
            {"id": "AB2CD3EF4GH5"},
            "keys[0].id: expected 12 of the letters a to z and digits 2 to 7, got the text",
        ),
        ({"id": 7}, "keys[0].id: expected 12 of the letters a to z and digits 2 to 7, got 7 (file x)"),
        ({"sha256": SHA256[:-1]}, "keys[0].sha256: expected 64 hex digits, of the secret's SHA-256, got"),
        ({"tenant": ""}, "keys[0].tenant: expected text that is not empty, got the text ''"),
        ({"tenant": "a\nb"}, "keys[0].tenant: expected at most 256 printable characters, got the text"),
        ({"tenant": "a" * 257}, "keys[0].tenant: expected at most 256 printable characters, got the text"),
        ({"name": "a\x7f"}, "keys[0].name: expected at most 256 printable characters, got the text"),
        (
            {"scopes": "infer"},
            "keys[0].scopes: expected an array of text that is not empty, got",
        ),
        ({"scopes": []}, "keys[0].scopes: expected an array of text that is not empty, got"),
        (
            {"scopes": ["infer metadata"]},
            "keys[0].scopes: expected single words, without quotes and backslashes, got the text 'infer meta",
        ),
        (
            {"scopes": ["gold", "infre"]},
            "keys[0].scopes: expected a permission among them: infer, infer:MODEL, metadata, admin; got gold",
        ),
        ({"scope": ["infer"]}, "keys[0].scope: unknown key; did you mean scopes? (file x)"),
        ({"expires": "2027-01-31"}, f"keys[0].expires: expected {EACH}, got the text '2027-01-31' (file x)"),
        ({"expires": 1}, f"keys[0].expires: expected {EACH}, got 1 (file x)"),
        ({"expires": True}, f"keys[0].expires: expected {EACH}, got true (file x)"),
    ],
)
def test_a_wrong_entry_is_explained(change: dict[str, Any], message: str) -> None:
    entry = {name: value for name, value in (ENTRY | change).items() if value is not None}
    with pytest.raises(SettingsError) as error:
        keys_of(entry)
    assert str(error.value).startswith(message)
    assert str(error.value).endswith("(file x)")


def test_all_errors_of_a_file_are_reported() -> None:
    with pytest.raises(SettingsError) as error:
        keys_of(ENTRY | {"id": 7, "scope": "x"}, ENTRY | {"sha256": "0"}, ENTRY)
    assert [message.partition(":")[0] for message in error.value.messages] == [
        "keys[0].id",
        "keys[0].scope",
        "keys[1].sha256",
    ]


def test_two_keys_cannot_have_one_id() -> None:
    other = ENTRY | {"id": "zzzzzzzzzzzz"}
    with pytest.raises(SettingsError) as error:
        keys_of(ENTRY, other, ENTRY)
    assert str(error.value) == f"keys[2].id: {ID} is the ID of two keys (file x)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[key]]", "key: unknown key; expected [[keys]] only (file PATH)"),
        ("keys = 1", "keys: expected an array of tables, written [[keys]], got 1 (file PATH)"),
        ("keys = [1]", "keys[0]: expected a table, got 1 (file PATH)"),
        ("[[keys]", "auth.api_keys_file: PATH is not TOML:"),
        ("keys = " + "9" * 5000, "auth.api_keys_file: PATH is not TOML:"),
        ("keys = " + "[" * 20_000, "auth.api_keys_file: PATH is not TOML:"),
    ],
)
def test_a_wrong_file_is_explained(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "api-keys.toml"
    path.write_text(text)
    with pytest.raises(SettingsError) as error:
        ApiKeys.read(path)
    assert str(error.value).startswith(message.replace("PATH", str(path)))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^auth.api_keys_file: cannot read .*gone: No such file"):
        ApiKeys.read(tmp_path / "gone")


def test_mint_refuses_entries_that_the_file_would_refuse() -> None:
    for tenant, scopes, name in [
        ("", ["infer"], ""),
        ("t", [], ""),
        ("t", ["gold"], ""),
        ("t", ["infer"], "\n"),
    ]:
        with pytest.raises(SettingsError, match="the new key"):
            mint(tenant, scopes, name)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_can_be_written_as_toml(text: str) -> None:
    assert tomllib.loads(f"text = {toml_string(text)}") == {"text": text}


def test_the_digest_may_be_in_upper_case() -> None:
    assert keys_of(ENTRY | {"sha256": SHA256.upper()}).find(KEY, 0.0) is not None
