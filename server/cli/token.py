"""`cobatch token`: keys, tokens and API keys for development, and the configuration for them.

They stand in for an issuer. A token or an API key, which goes into a shell's variable, is alone on stdout;
explanations go to stderr.
"""

import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cobatch.server.auth.api_keys import ApiKeys, toml_string
from cobatch.server.auth.api_keys import mint as mint_api_key
from cobatch.server.cli.token_keys import PRIVATE, issuer_of, load_signer, make_pair, sign, write
from cobatch.server.console import end, option, switch
from cobatch.server.settings.auth import AuthSettings, build_auth
from cobatch.server.settings.values import Errors, Given, Reader, SettingsError, check, read_toml

# RFC 6761, 6.4: a reserved name, so no other issuer has it.
ISSUER = "https://cobatch.dev.invalid"
ADDRESS = "http://127.0.0.1:8000"
KEY, JWKS, API_KEYS, CONFIG = "dev-key.pem", "dev-jwks.json", "api-keys.toml", "cobatch.toml"
_SCOPE = "infer metadata"
_TENANT = "me"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

_Algorithm = Annotated[str, option("RS256|PS256|ES256|EdDSA", "Algorithm that the key signs with.")]
_Force = Annotated[bool, switch("--force", "Replace existing files.")]
_Scope = Annotated[str, option("WORDS", "Permissions, separated by spaces.")]
_Tenant = Annotated[str, option("NAME", "Tenant that the requests belong to.")]

token_app = typer.Typer(
    help="Make keys, tokens and API keys for development. In production an issuer signs the tokens.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@token_app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder; made if it is missing.")] = Path(),
    model: Annotated[Path | None, option("FILE", "Model file for the configuration.")] = None,
    alg: _Algorithm = "RS256",
    force: _Force = False,
) -> None:
    """Set up a protected server for development.

    Makes keys, an API key and a configuration, and prints how to serve and call with them. Anyone who reads
    the private key can make any token. In production an issuer signs the tokens.
    """
    with _refusals():
        algorithm = _algorithm(alg)
        if model is not None and not model.is_file():
            raise SettingsError(f"{model}: no model file there (flag --model)")
        pem, jwks = make_pair(algorithm)
        api_key, entry = mint_api_key(_TENANT, _SCOPE.split(), "cobatch token init")
        private = {folder / KEY: pem, folder / API_KEYS: entry.encode()}
        config = _config_text(folder, model, algorithm).encode()
        write(private, {folder / JWKS: jwks, folder / CONFIG: config}, force=force)
    typer.echo(_next_steps(folder, model, api_key))


@token_app.command("mint")
def mint(
    key: Annotated[Path | None, option("FILE", f"Private key, or HS256's secret (default: {KEY}).")] = None,
    config: Annotated[Path | None, option("FILE", "The server's configuration, with [auth].")] = None,
    issuer: Annotated[str | None, option("URL", "The token's iss.")] = None,
    audience: Annotated[str | None, option("URL", "The token's aud.")] = None,
    tenant: _Tenant = _TENANT,
    scope: _Scope = _SCOPE,
    expires_in: Annotated[str, option("TIME", "Lifetime: 90s, 30m, 12h or 7d.")] = "1h",
    kid: Annotated[str | None, option("ID", "Key ID (default: the one in the server's keys).")] = None,
    alg: Annotated[str | None, option("ALGORITHM", "PS256 for an RSA key (default: the key's).")] = None,
) -> None:
    """Print an access token (RFC 9068) for development, signed with a key of yours.

    Issuer and audience come from the server's --config, or from --issuer and --audience, which win. In
    production an issuer signs the tokens.
    """
    with _refusals():
        lifetime_s = _seconds(expires_in)
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
            raise SettingsError("give --config, or --issuer and --audience: a token needs both")
        if alg is not None and alg not in signer.algorithms:
            expected = f"one of {', '.join(signer.algorithms)}"
            raise Given(alg, "alg", "flag --alg").unexpected(expected, text=True)
        token = sign(claims, signer, alg or algorithm, kid or name, lifetime_s)
    typer.echo(token)


@token_app.command("keypair")
def keypair(
    output: Annotated[str, option("NAME", "NAME.pem, NAME.jwks.json.", "--output", "-o")],
    alg: _Algorithm = "RS256",
    force: _Force = False,
) -> None:
    """Make a key pair, and print the configuration for it.

    NAME.pem signs tokens, NAME.jwks.json lets a server check them. In production an issuer signs the
    tokens, and has its own keys.
    """
    private, public = Path(f"{output}.pem"), Path(f"{output}.jwks.json")
    with _refusals():
        algorithm = _algorithm(alg)
        pem, jwks = make_pair(algorithm)
        write({private: pem}, {public: jwks}, force=force)
    typer.echo(f"# {private} is private: its readers can make any token. {public} is public.", err=True)
    typer.echo("# For the server's configuration; key_files are relative to its folder:", err=True)
    typer.echo(f'[auth]\naudience = ["{ADDRESS}"]\n\n{_issuer_text(public.name, algorithm)}', nl=False)


@token_app.command("api-key")
def api_key(
    tenant: _Tenant,
    scope: _Scope = _SCOPE,
    name: Annotated[str, option("TEXT", "Note about its holder.")] = "",
    expires_in: Annotated[str | None, option("TIME", "Lifetime, as 12h or 90d (default: unlimited).")] = None,
    file: Annotated[Path | None, option("FILE", f"File to add its hash to, such as {API_KEYS}.")] = None,
) -> None:
    """Make an API key, for a client that cannot do OAuth.

    It is printed only once, on stdout; the file holds its hash.
    """
    with _refusals():
        expires = None
        if expires_in is not None:
            expires = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=_seconds(expires_in))
        secret, entry = mint_api_key(tenant, scope.split(), name, expires)
        if file is not None:
            _append_key(file, entry)
    if file is None:
        typer.echo(f"# For the file that api_keys_file names in [auth]:\n{entry}", err=True, nl=False)
    else:
        typer.echo(f"cobatch: added to {file}, which a server reads when it starts", err=True)
    typer.echo(secret)


@contextmanager
def _refusals() -> Iterator[None]:
    """End the command on a refusal: one line on stderr, and status 2."""
    try:
        yield
    except SettingsError as error:
        raise end(str(error), 2) from None


def _algorithm(text: str) -> str:
    kind = Literal["RS256", "PS256", "ES256", "EdDSA"]
    return str(check("alg", text, kind, "flag --alg", text=True).value)


def _seconds(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,5})([smhd])", text)
    seconds = int(match[1]) * _UNITS[match[2]] if match is not None else 0
    if seconds == 0:
        raise SettingsError(f"expires-in: expected 90s, 30m, 12h or 7d, got {text!r} (flag --expires-in)")
    return seconds


def _auth_in(config: Path) -> AuthSettings:
    """Read `[auth]` alone: no model needs to be there to mint a token."""
    document = read_toml(config, "config", "flag --config")
    if "auth" not in document:
        raise SettingsError(f"auth: missing; the server would not ask for tokens (file {config})")
    errors = Errors()
    source = f"file {config}"
    table = Reader(source, config.parent, errors).table("auth", document["auth"], AuthSettings)
    auth = build_auth(table, source, errors)
    errors.raise_any()
    if not auth.issuers:
        raise SettingsError(f"auth.issuers: missing; the server accepts API keys only (file {config})")
    return auth


def _append_key(path: Path, entry: str) -> None:
    """Add an API key's table to its file, or make the file. Raises SettingsError if it would be refused."""
    try:
        text = path.read_bytes().decode() if path.exists() else ""
        addition = ("" if not text else "\n" if text.endswith("\n") else "\n\n") + entry
        ApiKeys.parse(tomllib.loads(text + addition), f"file {path}")
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, PRIVATE), "ab") as file:
            file.write(addition.encode())
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{path}: not a file of API keys: {error}") from None


def model_name(model: Path) -> str:
    """Return the file's name, as far as it can stand in a URL."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model.stem).lstrip("._-")[:128] or "model"


def _issuer_text(jwks: str, algorithm: str) -> str:
    source = f"issuer = {toml_string(ISSUER)}\nkey_files = [{toml_string(jwks)}]"
    return f"[[auth.issuers]]\n{source}\nalgorithms = [{toml_string(algorithm)}]\n"


def _config_text(folder: Path, model: Path | None, algorithm: str) -> str:
    models = ""
    if model is not None:
        path = model.resolve()
        if path.is_relative_to(folder.resolve()):
            path = path.relative_to(folder.resolve())
        models = f"[[models]]\npath = {toml_string(str(path))}\nname = {toml_string(model_name(model))}\n\n"
    return f"""\
# Made by `cobatch token init`, for development: anyone with the private key can make any token.
# In production an issuer signs tokens; [[auth.issuers]] then names it, and it publishes its keys.

{models}[auth]
audience = [{toml_string(ADDRESS)}]  # this server, in a token's aud
api_keys_file = {toml_string(API_KEYS)}

{_issuer_text(JWKS, algorithm)}"""


def _next_steps(folder: Path, model: Path | None, api_key: str) -> str:
    config = shlex.quote(str(folder / CONFIG))
    url = f"{ADDRESS}/v2/models/{'NAME' if model is None else model_name(model)}"
    serve = "cobatch serve MODEL" if model is None else "cobatch serve"
    names = ", where MODEL is a model's file and NAME its name without the suffix" if model is None else ""
    return f"""\
Made in {folder}, for development:
  {KEY:14} signs tokens: anyone who reads it can make any token
  {JWKS:14} its public half, with which the server checks tokens
  {API_KEYS:14} the hash of an API key
  {CONFIG:14} the server's configuration

Serve, and call from another terminal{names}:
  {serve} --config {config}
  TOKEN=$(cobatch token mint --config {config})
  curl -H "Authorization: Bearer $TOKEN" {url}

Or with the API key, which is printed only this once:
  curl -H "X-API-Key: {api_key}" {url}"""
