"""An engine at an address, spoken to by TLS; and one that is not of this host, which is refused at the start."""

import asyncio
import datetime
import ipaddress
import ssl
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from carrel.errors import EngineElsewhere, EngineUnavailable, InvalidSettings

pytestmark = [pytest.mark.cli, pytest.mark.requires("docker", "images"), pytest.mark.timeout(120)]

Json = dict[str, Any]
SOCKET = "/var/run/docker.sock"


class Authority:
    """Gives certificates."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(_pem(self._certificate(self._name, self._key, authority=True)))

    def give(self, name: str) -> tuple[Path, Path]:
        """The files of a certificate and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key)
        files = self._folder / f"{name}-cert.pem", self._folder / f"{name}-key.pem"
        files[0].write_bytes(_pem(certificate))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files

    def _certificate(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(here, critical=False)
            .sign(self._key, hashes.SHA256())
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@dataclass
class Remote:
    """An address at which an engine answers by TLS those alone whom its authority knows."""

    host: str
    authority: Authority
    folder: Path

    def settings(self, **changed: Any) -> Json:
        """Of a server that uses it."""
        cert, key = self.authority.give("gateway")
        given = {"host": self.host, "tls_ca": self.authority.path, "tls_cert": cert, "tls_key": key, "wait_seconds": 0}
        return {"docker": {name: value for name, value in (given | changed).items() if value is not None}}


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[Remote]:
    """The machine's own engine behind a listener for TLS, as `dockerd --tlsverify` has it."""
    authority = Authority(tmp_path, "authority")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.give("engine"))
    context.load_verify_locations(authority.path)
    context.verify_mode = ssl.CERT_REQUIRED
    serving: set[asyncio.Task[Any]] = set()

    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            target.write(data)
            await target.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            far_reader, far_writer = await asyncio.open_unix_connection(SOCKET)
            ways = [asyncio.ensure_future(pump(reader, far_writer)), asyncio.ensure_future(pump(far_reader, writer))]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
                far_writer.close()
        except asyncio.CancelledError:  # the test ends; nobody awaits this task
            pass
        finally:
            serving.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield Remote(f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}", authority, tmp_path)
    server.close()
    for task in serving:
        task.cancel()
    await asyncio.gather(*serving, return_exceptions=True)


async def test_a_turn_in_a_container_of_an_engine_that_is_spoken_to_by_tls(remote: Remote, start: Any) -> None:
    api = await start(runtime="docker", **remote.settings(wait_seconds=30))
    session = await api.session()
    turn = await api.run(session, "[[bash: echo within; hostname]]")
    assert (turn["status"], turn["tool_calls"][0]["result"]) == ("succeeded", "within\ncarrel"), turn
    assert list((api.server.data / "containers").glob("probe-*")) == []
    await api.ask("DELETE", f"/sessions/{session}", 204)


async def test_whom_the_engine_does_not_know_it_does_not_answer(remote: Remote, start: Any) -> None:
    with pytest.raises(EngineUnavailable, match="No Docker engine answers"):
        await start(runtime="docker", **remote.settings(tls_cert=None, tls_key=None))


async def test_an_engine_of_another_authority_is_not_believed(remote: Remote, start: Any) -> None:
    other = Authority(remote.folder, "another")
    with pytest.raises(EngineUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
        await start(runtime="docker", **remote.settings(tls_ca=other.path))


async def test_files_that_are_no_certificates_are_named(remote: Remote, start: Any) -> None:
    (remote.folder / "empty.pem").write_text("")
    with pytest.raises(InvalidSettings, match=r"docker\.tls_ca"):
        await start(runtime="docker", **remote.settings(tls_ca=remote.folder / "empty.pem"))


async def test_an_engine_that_does_not_see_our_files_is_refused_at_the_start(remote: Remote, start: Any) -> None:
    # A short path: otherwise the sockets stand elsewhere, for which the engine's host would have no name either.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="docker-") as data:
        with pytest.raises(EngineElsewhere, match="Run Carrel beside its engine"):
            await start(runtime="docker", data=data, **remote.settings(data_on_host="/nowhere/at/all"))
        assert list(Path(data, "containers").iterdir()) == []
