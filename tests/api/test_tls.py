"""A server that encrypts: the line it prints, its own commands, and clients that do or do not trust its certificate."""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import subprocess
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.api.test_up import run, up
from tests.live import PATIENCE_S, write_script


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "nimbos test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    cert_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return cert_file, key_file


def test_a_server_with_a_certificate_is_reached_by_those_who_trust_it_and_by_nobody_in_the_clear(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    certificate, key = write_certificate(tmp_path)
    script = f"scripted:{write_script(tmp_path, 'play', {'default': {'text': 'Hello there!'}})}"
    with up(home, "--model", script, "--tls-cert", str(certificate), "--tls-key", str(key)) as server:
        assert server.url.startswith("https://127.0.0.1:")
        line = server.printed[server.printed.index("  curl") :]
        pasted = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
        assert json.loads(pasted.stdout)["choices"][0]["message"]["content"] == "Hello there!"
        shown = run(home, "usage", "--json")  # a command of the same home finds the server and its certificate
        assert json.loads(shown.stdout)["total"]["asks"] == 1, shown.stderr
        trusting = ssl.create_default_context(cafile=str(certificate))
        assert httpx2.get(server.url + "/health", verify=trusting).status_code == 200
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(server.url + "/health")
        with pytest.raises(httpx2.TransportError):
            httpx2.get(server.url.replace("https://", "http://") + "/health")


def test_a_key_that_does_not_belong_to_the_certificate_ends_the_start_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    certificate, _ = write_certificate(tmp_path / "one")
    _, other = write_certificate(tmp_path / "two")
    done = run(tmp_path / "home", "up", "--tls-cert", str(certificate), "--tls-key", str(other))
    assert done.returncode == 1
    assert "cannot be used for TLS" in done.stderr
    assert done.stderr.count("\n") == 1
