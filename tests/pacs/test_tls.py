"""With TLS, studies reach only an archive whose certificate is trusted, and come only to a client that it trusts."""

import gc
import subprocess
import sys
from io import BytesIO

import pytest
from pydicom import dcmread

from ichprog.pacs import ArchiveError, TlsFiles, open_archive

from support.dicom_series import write
from support.orthanc import PROGRAM, Orthanc, free_port

trustme = pytest.importorskip("trustme")
pytest.importorskip("pynetdicom")
pytest.importorskip("dicomweb_client")
pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="needs Orthanc, of the package orthanc"),
    pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning"),  # pynetdicom leaves refused ones open
]
STUDY = "1.2.3.4"


def start(folder, host, authority):
    archive = Orthanc(folder, move_port=free_port(), tls=(authority, authority.issue_cert(host)))
    return archive.start()


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def archive(tmp_path_factory, authority):
    """Return an archive with one study of four slices."""
    folder = tmp_path_factory.mktemp("secure")
    orthanc = start(folder / "orthanc", "127.0.0.1", authority)
    for file in write(folder / "series", tags={"StudyInstanceUID": STUDY}, count=4):
        orthanc.upload(file.read_bytes())
    yield orthanc
    orthanc.kill()


@pytest.fixture(autouse=True)
def certificates_of_the_environment(monkeypatch, tmp_path):
    """Name other certificates in the environment, which many machines do and which must not replace the given ones."""
    trustme.CA().cert_pem.write_to_path(tmp_path / "environment.pem")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "environment.pem"))


@pytest.fixture
def files(tmp_path, authority):
    """Return the files of a client that the archive trusts."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    authority.issue_cert("client").private_key_and_cert_chain_pem.write_to_path(tmp_path / "client.pem")
    return TlsFiles(tmp_path / "ca.pem", tmp_path / "client.pem", tmp_path / "client.pem")


def connect(orthanc, kind, files):
    if kind == "web":
        if not orthanc.has_web:
            pytest.skip("needs the DICOMweb plugin of Orthanc, of the package orthanc-dicomweb")
        return open_archive(orthanc.web_address, tls=files)
    return open_archive(orthanc.network_address, retrieve=kind, receive_port=orthanc.move_port, tls=files)


def refused(client, kind):
    """Refused because of the certificate; pynetdicom does not pass the reason on."""
    reason = "certificate verify failed" if kind == "web" else "Check its address and title, the certificates"
    with pytest.raises(ArchiveError, match=reason):
        client.find({})
    gc.collect()  # here, where the warning about pynetdicom's socket is expected


def refused_command(address, *options):
    """In a process of its own, because pynetdicom leaves the socket open if the archive closes it."""
    command = [sys.executable, "-m", "ichprog", "pacs", "find", address, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ORTHANC at 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["get", "move", "web"])
def test_a_study_makes_the_round_trip(archive, files, tmp_path, kind):
    client = connect(archive, kind, files)
    assert [study.uid for study in client.find({})] == [STUDY]
    assert client.fetch(STUDY, tmp_path / "fetched") == 4
    before = len(archive.instances())
    image = dcmread(next((tmp_path / "fetched").iterdir()))
    image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"1.2.{['get', 'move', 'web'].index(kind)}"
    image.SeriesInstanceUID, image.Modality = "1.2.9", "OT"
    buffer = BytesIO()
    image.save_as(buffer)
    client.store([dcmread(BytesIO(buffer.getvalue()))])
    assert len(archive.instances()) == before + 1


@pytest.mark.parametrize("kind", ["get", "web"])
def test_an_archive_of_another_authority_is_refused(archive, tmp_path, kind):
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    for files in (TlsFiles(), TlsFiles(tmp_path / "other.pem")):
        refused(connect(archive, kind, files), kind)


def test_a_client_without_a_certificate_is_refused(archive, files):
    refused_command(archive.network_address, "--tls-ca", files.ca)


@pytest.mark.parametrize("kind", ["get", "web"])
def test_a_certificate_of_another_host_is_refused(authority, files, tmp_path, kind):
    archive = start(tmp_path / "elsewhere", "elsewhere.example", authority)
    try:
        refused(connect(archive, kind, files), kind)
    finally:
        archive.kill()


def test_an_unencrypted_connection_is_refused(archive):
    address = archive.network_address.replace("dicoms", "dicom")
    refused_command(address)
