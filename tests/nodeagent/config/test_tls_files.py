"""The files of TLS: what is wrong with them is said by key."""

from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from nodeagent.config import parse_config, tls_context
from nodeagent.errors import ConfigError

MINIMAL = "models: [{model_id: a, path: a.gguf}]\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """node.pem and node.key, other.key of another certificate, ca.pem, and locked.key with a passphrase."""
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    node, other = authority.issue_cert("node.example"), authority.issue_cert("other.example")
    node.private_key_pem.write_to_path(folder / "node.key")
    for index, blob in enumerate(node.cert_chain_pems):
        blob.write_to_path(folder / "node.pem", append=bool(index))
    other.private_key_pem.write_to_path(folder / "other.key")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    key = serialization.load_pem_private_key(node.private_key_pem.bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"passphrase"),
    )
    (folder / "locked.key").write_bytes(locked)
    (folder / "text").write_text("no certificate\n")
    return folder


def test_without_a_certificate_there_is_no_tls(folder: Path) -> None:
    assert tls_context(parse_config(MINIMAL, folder / "n.yaml")) is None


def test_a_certificate_and_its_key_make_a_context_that_speaks_http_1_1(folder: Path) -> None:
    text = f"{MINIMAL}tls_cert: node.pem\ntls_key: node.key\ntls_client_ca: ca.pem\n"
    context = tls_context(parse_config(text, folder / "n.yaml"))
    assert context is not None
    assert context.minimum_version.name == "TLSv1_2"
    assert len(context.get_ca_certs()) == 1


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ("tls_cert: node.pem", "n.yaml:2: tls_cert: needs tls_key as well"),
        ("tls_key: node.key", "n.yaml:2: tls_key: needs tls_cert as well"),
        ("tls_client_ca: ca.pem", "n.yaml:2: tls_client_ca: needs tls_cert as well"),
        ("tls_cert: missing\ntls_key: node.key", "n.yaml:2: tls_cert: can't be read:"),
        ("tls_cert: node.pem\ntls_key: missing", "n.yaml:3: tls_key: can't be read:"),
        (
            "tls_cert: text\ntls_key: node.key",
            "n.yaml:2: tls_cert: must be a PEM file with a certificate, and",
        ),
        (
            "tls_cert: node.pem\ntls_key: text",
            "n.yaml:2: tls_cert: must be a PEM file with a certificate, and",
        ),
        ("tls_cert: node.pem\ntls_key: other.key", "n.yaml:3: tls_key: is not the key of the certificate in tls_cert"),
        ("tls_cert: node.pem\ntls_key: locked.key", "n.yaml:3: tls_key: is encrypted:"),
        (
            "tls_cert: node.pem\ntls_key: node.key\ntls_client_ca: text",
            "n.yaml:4: tls_client_ca: must be a PEM file of certificates",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(keys: str, complaint: str, folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        tls_context(parse_config(f"{MINIMAL}{keys}\n", folder / "n.yaml"))
    assert complaint in str(caught.value)
