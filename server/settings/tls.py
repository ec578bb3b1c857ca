"""The certificate and private key of the server."""

import ssl

from cobatch.server.settings.values import SettingsError


def load_certificate(context: ssl.SSLContext, cert: str, key: str | None) -> None:
    """Read a certificate chain and its key into a context. Raises SettingsError."""
    try:
        context.load_cert_chain(cert, key, _no_password)
    except (OSError, ValueError) as error:  # ssl's errors are OSErrors
        # The system's text does not say which of the files cannot be read.
        files = cert if key is None else f"{cert} with {key}"
        why = getattr(error, "strerror", None) or getattr(error, "reason", None) or str(error)
        raise SettingsError(f"cannot use {files}: {why}") from None


def check_certificate(cert: str, key: str | None) -> None:
    """Read the files as the server will. Raises SettingsError."""
    load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), cert, key)


def replace_certificate(context: ssl.SSLContext, cert: str, key: str | None) -> None:
    """Read the files again, for new connections. Raises SettingsError, and keeps the old certificate."""
    check_certificate(cert, key)  # a context that has taken half of a pair cannot go back
    load_certificate(context, cert, key)


def _no_password() -> str:
    """Refuse an encrypted key; without this OpenSSL would ask on the terminal."""
    raise ValueError("the key is encrypted")
