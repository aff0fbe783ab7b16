"""`tls_cert`, `tls_key` and `tls_client_ca`: the certificate that the node shows, and those that it asks for."""

import ssl
from typing import NoReturn

from nodeagent.config.keys import NodeConfig
from nodeagent.errors import ConfigError


def tls_context(config: NodeConfig) -> ssl.SSLContext | None:
    """The TLS of the node's address, None without `tls_cert`. Reads the files; blocks on the disk.

    TLS 1.2 and 1.3; HTTP/2 for clients that ask for it, else HTTP/1.1. Raises ConfigError if a file can't be used.
    """
    if config.tls_cert is None or config.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2", "http/1.1"])
    for key in ("tls_cert", "tls_key", "tls_client_ca"):
        file = getattr(config, key)
        try:
            if file is not None:
                file.read_bytes()
        except OSError as error:
            raise _wrong(config, key, f"can't be read: {file}: {error.strerror}") from error
    try:
        # Without a password OpenSSL would ask on the terminal.
        context.load_cert_chain(config.tls_cert, config.tls_key, password=_no_password)
    except _Encrypted as error:
        raise _wrong(config, "tls_key", f"is encrypted: {config.tls_key}; give a key without a passphrase") from error
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            message = f"is not the key of the certificate in tls_cert: {config.tls_key}"
            raise _wrong(config, "tls_key", message) from error
        message = "must be a PEM file with a certificate, and tls_key one with its private key"
        raise _wrong(config, "tls_cert", f"{message}; found {config.tls_cert} and {config.tls_key}") from error
    if config.tls_client_ca is not None:
        try:
            context.load_verify_locations(config.tls_client_ca)
        except ssl.SSLError as error:
            message = f"must be a PEM file of certificates, found {config.tls_client_ca}: {error.reason or error}"
            raise _wrong(config, "tls_client_ca", message) from error
        # Who shows none is refused by the front, unless it is on this host.
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


class _Encrypted(Exception):
    """The private key needs a passphrase."""


def _no_password() -> NoReturn:
    raise _Encrypted


def _wrong(config: NodeConfig, key: str, message: str) -> ConfigError:
    return ConfigError([config.problem((key,), message)])
