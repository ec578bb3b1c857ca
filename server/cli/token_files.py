"""What `cobatch token` writes: files that are not overwritten by accident, and the configuration for them."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cobatch.server.auth.api_keys import ApiKeys, toml_string
from cobatch.server.settings.values import SettingsError

# RFC 6761, 6.4: a name that nobody can have, so nobody else's tokens carry it.
ISSUER = "https://cobatch.dev.invalid"
ADDRESS = "http://127.0.0.1:8000"
PRIVATE = 0o600
PUBLIC = 0o644


class Output(NamedTuple):
    """A file to write."""

    path: Path
    content: bytes
    mode: int = PUBLIC


def write(outputs: Sequence[Output], *, force: bool) -> None:
    """Write all files, or none where one is there already and `force` is not set. Raises SettingsError."""
    for output in outputs:
        if os.path.lexists(output.path) and not force:
            raise SettingsError(f"{output.path} is there already; --force replaces it")
    for output in outputs:
        try:
            output.path.parent.mkdir(parents=True, exist_ok=True)
            output.path.unlink(missing_ok=True)
            # O_EXCL: the mode is ours from the first byte on, and no link leads elsewhere.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            with os.fdopen(os.open(output.path, flags, output.mode), "wb") as file:
                file.write(output.content)
        except OSError as error:
            raise SettingsError(f"cannot write {output.path}: {error.strerror}") from None


def append_key(path: Path, entry: str) -> None:
    """Add an API key's table to its file, which is made where it is not there. Raises SettingsError.

    The file is refused as it would be with the entry, before anything is written.
    """
    try:
        text = path.read_bytes().decode() if path.exists() else ""
        between = "" if not text else "\n" if text.endswith("\n") else "\n\n"
        addition = between + entry
        ApiKeys.parse(tomllib.loads(text + addition), f"file {path}")
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE), "ab") as file:
            file.write(addition.encode())
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{path}: no file of API keys: {error}") from None


def issuer_text(jwks: str, algorithm: str) -> str:
    """`[[auth.issuers]]` for tokens that are signed here."""
    return (
        "[[auth.issuers]]\n"
        f"issuer = {toml_string(ISSUER)}\n"
        f"key_files = [{toml_string(jwks)}]\n"
        f"algorithms = [{toml_string(algorithm)}]\n"
    )


def config_text(folder: Path, model: Path | None, jwks: str, api_keys: str, algorithm: str) -> str:
    """A whole configuration file, for `folder`."""
    heading = (
        "# Made by `cobatch token init`, for development: whoever has the private key can make any token.\n"
        "# In production an issuer signs tokens; [[auth.issuers]] then names it, and its keys come from it.\n"
    )
    parts = [heading]
    if model is not None:
        shown = model.resolve()
        if shown.is_relative_to(folder.resolve()):
            shown = shown.relative_to(folder.resolve())
        name = toml_string(model_name(model))
        parts.append(f"[[models]]\npath = {toml_string(str(shown))}\nname = {name}\n")
    parts.append(
        "[auth]\n"
        f"audience = [{toml_string(ADDRESS)}]  # this server, in a token's aud\n"
        f"api_keys_file = {toml_string(api_keys)}\n"
    )
    return "\n".join([*parts, issuer_text(jwks, algorithm)])


def model_name(model: Path) -> str:
    """The file's name, as far as it can stand in a URL."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model.stem).lstrip("._-")[:128] or "model"
