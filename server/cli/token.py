"""The `cobatch token` commands: keys, tokens and API keys for development, and the configuration for them.

They stand in for an issuer where there is none yet. What goes into a shell's variable (a token, an API
key) is alone on stdout; what is said about it goes to stderr.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cobatch.server.auth.api_keys import mint as mint_api_key
from cobatch.server.cli.token_files import (
    ADDRESS,
    PRIVATE,
    Output,
    append_key,
    config_text,
    issuer_text,
    model_name,
    write,
)
from cobatch.server.console import end
from cobatch.server.settings.auth import AuthSettings, read_auth
from cobatch.server.settings.values import Errors, SettingsError, check, read_toml, refused

KEY, JWKS, API_KEYS, CONFIG = "dev-key.pem", "dev-jwks.json", "api-keys.toml", "cobatch.toml"
_SCOPE = "infer metadata"
_TENANT = "me"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_Asymmetric = Literal["RS256", "PS256", "ES256", "EdDSA"]

_Alg = Annotated[
    str, typer.Option("--alg", metavar="RS256|PS256|ES256|EdDSA", help="What the key signs with.")
]
_Force = Annotated[bool, typer.Option("--force", help="Replace files that are there already.")]
_Scope = Annotated[str, typer.Option("--scope", metavar="WORDS", help="What it permits, in one text.")]

token_app = typer.Typer(
    help="Make keys, tokens and API keys for development. In production an issuer signs the tokens.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@token_app.command("init")
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to; made if it is not there.")
    ] = Path(),
    model: Annotated[
        Path | None, typer.Option("--model", metavar="FILE", help="A model file, for the configuration.")
    ] = None,
    alg: _Alg = "RS256",
    force: _Force = False,
) -> None:
    """Set up a protected server for development.

    Makes keys, an API key and a configuration, and prints how to serve and to call with them. Whoever
    reads the private key can make any token. In production an issuer signs the tokens.
    """
    with _refusals():
        algorithm = check("alg", alg, _Asymmetric, "flag --alg", text=True).value
        if model is not None and not model.is_file():
            raise SettingsError(f"{model}: no model file there (flag --model)")
        from cobatch.server.cli.token_keys import make_pair

        pair = make_pair(algorithm)
        api_key, entry = mint_api_key(_TENANT, _SCOPE.split(), "cobatch token init")
        config = config_text(folder, model, JWKS, API_KEYS, algorithm)
        outputs = [
            Output(folder / KEY, pair.pem, PRIVATE),
            Output(folder / JWKS, pair.jwks),
            Output(folder / API_KEYS, entry.encode(), PRIVATE),
            Output(folder / CONFIG, config.encode()),
        ]
        write(outputs, force=force)
    typer.echo(_next_steps(folder, model, api_key))


@token_app.command("mint")
def mint(
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="FILE", help=f"Private key, or HS256's secret (default: {KEY})."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="The server's settings, with [auth]."),
    ] = None,
    issuer: Annotated[str | None, typer.Option("--issuer", metavar="URL", help="The token's iss.")] = None,
    audience: Annotated[
        str | None, typer.Option("--audience", metavar="URL", help="The token's aud.")
    ] = None,
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whom it is for (sub).")] = _TENANT,
    scope: _Scope = _SCOPE,
    expires_in: Annotated[str, typer.Option(metavar="TIME", help="90s, 30m, 12h or 7d.")] = "1h",
    kid: Annotated[
        str | None,
        typer.Option("--kid", metavar="ID", help="The key's name (default: as the server knows it)."),
    ] = None,
    alg: Annotated[
        str | None,
        typer.Option("--alg", metavar="ALGORITHM", help="PS256 with an RSA key (default: the key's)."),
    ] = None,
) -> None:
    """Print an access token for development.

    It is of the form that RFC 9068 describes, and signed with a key of yours. Issuer and audience come
    from the server's --config, or from --issuer and --audience; these win. In production an issuer signs
    the tokens.
    """
    with _refusals():
        lifetime_s = _seconds(expires_in)
        from cobatch.server.cli.token_keys import issuer_of, load_signer, sign

        if key is None:
            key = Path(KEY) if config is None else config.parent / KEY
        signer = load_signer(key)
        claims: dict[str, Any] = {"iss": issuer, "aud": audience, "sub": tenant, "scope": scope}
        algorithm, name = signer.algorithms[0], signer.kid
        if config is not None:
            auth = _auth_in(config)
            known, found = issuer_of(auth, signer, f"file {config}")
            claims["iss"] = issuer or known.issuer
            claims["aud"] = audience or auth.audience[0]
            claims[known.tenant_claim] = tenant
            if "scope" not in known.permission_claims:
                claims[known.permission_claims[0]] = claims.pop("scope")
            algorithm, name = found.algorithm, found.kid or name
        if not claims["iss"] or not claims["aud"]:
            raise SettingsError("give --config, or --issuer and --audience: a token is of one, for the other")
        if alg is not None and alg not in signer.algorithms:
            raise refused("alg", f"one of {', '.join(signer.algorithms)}", alg, "flag --alg", text=True)
        token = sign(claims, signer, alg or algorithm, kid or name, lifetime_s)
    typer.echo(token)


@token_app.command("keypair")
def keypair(
    output: Annotated[str, typer.Option("--output", "-o", metavar="NAME", help="NAME.pem, NAME.jwks.json.")],
    alg: _Alg = "RS256",
    force: _Force = False,
) -> None:
    """Make a key pair, and print the configuration for it.

    NAME.pem signs tokens, NAME.jwks.json lets a server check them. In production an issuer signs the
    tokens, and has keys of its own.
    """
    private, public = Path(f"{output}.pem"), Path(f"{output}.jwks.json")
    with _refusals():
        algorithm = check("alg", alg, _Asymmetric, "flag --alg", text=True).value
        from cobatch.server.cli.token_keys import make_pair

        pair = make_pair(algorithm)
        write([Output(private, pair.pem, PRIVATE), Output(public, pair.jwks)], force=force)
    typer.echo(f"# {private} is private: whoever reads it can make any token. {public} is public.", err=True)
    typer.echo("# For the server's configuration; key_files are relative to its folder:", err=True)
    typer.echo(f'[auth]\naudience = ["{ADDRESS}"]\n\n{issuer_text(public.name, algorithm)}', nl=False)


@token_app.command("api-key")
def api_key(
    tenant: Annotated[str, typer.Option("--tenant", metavar="NAME", help="Whose requests they are.")],
    scope: _Scope = _SCOPE,
    name: Annotated[str, typer.Option("--name", metavar="TEXT", help="Who has it, for yourself.")] = "",
    expires_in: Annotated[
        str | None, typer.Option(metavar="TIME", help="12h or 90d (default: it does not expire).")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help=f"Where to add its hash, as {API_KEYS}.")
    ] = None,
) -> None:
    """Make an API key, for a client that cannot do OAuth.

    It is shown this once, on stdout; the file keeps its hash only.
    """
    with _refusals():
        lasting = None if expires_in is None else timedelta(seconds=_seconds(expires_in))
        expires = None if lasting is None else datetime.now(UTC).replace(microsecond=0) + lasting
        made, entry = mint_api_key(tenant, scope.split(), name, expires)
        if file is not None:
            append_key(file, entry)
    if file is None:
        typer.echo(f"# For the file that api_keys_file names in [auth]:\n{entry}", err=True, nl=False)
    else:
        typer.echo(f"cobatch: added to {file}, which a server reads when it starts", err=True)
    typer.echo(made)


def _auth_in(config: Path) -> AuthSettings:
    """`[auth]` alone: to mint a token, no model needs to be there."""
    document = read_toml(config, "flag --config")
    if "auth" not in document:
        raise SettingsError(f"auth: missing; the server would not ask for tokens (file {config})")
    errors = Errors()
    auth = read_auth(document["auth"], config.parent, f"file {config}", errors)
    errors.raise_any()
    if not auth.issuers:
        raise SettingsError(f"auth.issuers: missing; the server takes API keys only (file {config})")
    return auth


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,5})([smhd])", text)
    seconds = int(match[1]) * _UNITS[match[2]] if match is not None else 0
    if seconds == 0:
        raise SettingsError(f"expires-in: expected 90s, 30m, 12h or 7d, got {text!r} (flag --expires-in)")
    return seconds


def _next_steps(folder: Path, model: Path | None, api_key: str) -> str:
    config = shlex.quote(str(folder / CONFIG))
    url = f"{ADDRESS}/v2/models/{'NAME' if model is None else model_name(model)}"
    serve = "cobatch serve MODEL" if model is None else "cobatch serve"
    named = ", where MODEL is a model's file and NAME its name without the suffix" if model is None else ""
    return f"""\
Made in {folder}, for development:
  {KEY:14} signs tokens: whoever reads it can make any
  {JWKS:14} its public half, which the server checks tokens with
  {API_KEYS:14} the hash of an API key
  {CONFIG:14} the server's configuration

Serve, and call from another terminal{named}:
  {serve} --config {config}
  TOKEN=$(cobatch token mint --config {config})
  curl -H "Authorization: Bearer $TOKEN" {url}

Or with the API key, which is shown this once:
  curl -H "X-API-Key: {api_key}" {url}"""


@contextmanager
def _refusals() -> Iterator[None]:
    """What is refused ends the command: one line on stderr, and status 2."""
    try:
        yield
    except SettingsError as error:
        raise end(str(error), 2) from None
