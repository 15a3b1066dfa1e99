"""Clients of a picture archive (PACS): find studies, fetch their CT series, and store objects.

`open_archive` returns a client by the address: `dicom://` and `dicoms://` speak the DICOM network protocol (C-FIND,
C-GET or C-MOVE, C-STORE), `http://` and `https://` speak DICOMweb (QIDO, WADO, STOW).
"""

import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from ichprog.errors import InvalidValueError, RunError, missing_extra
from ichprog.limits import MAX_DICOM_BYTES, MAX_DICOM_FILES

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

ADDRESSES = "dicom://AET@HOST:PORT, dicoms://AET@HOST:PORT, http://HOST/PATH or https://HOST/PATH"
_TIMEOUT_S = 60.0
_PENDING = (0xFF00, 0xFF01)
_STUDY_KEYS = ("StudyInstanceUID", "StudyDate", "StudyTime", "StudyDescription", "NumberOfStudyRelatedInstances")


class ArchiveError(RunError):
    """An archive that cannot be reached, or that refuses a request; a later try may succeed."""


@dataclass(frozen=True)
class FoundStudy:
    """A study in an archive.

    Attributes:
        uid: Study Instance UID.
        date: Date of the study as DICOM writes it, or "".
        description: Description of the study, or "".
        instances: Number of its instances; 0 if the archive does not tell.
    """

    uid: str
    date: str
    description: str
    instances: int


@dataclass(frozen=True)
class TlsFiles:
    """Files of a connection with TLS, in PEM format.

    Attributes:
        ca: Certificates that may sign that of the archive; None for those of the system.
        certificate: Certificate of this client; None if the archive asks for none.
        key: Private key of the certificate.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Return the context of a connection, which checks certificate and host name of the archive."""
        context = ssl.create_default_context(cafile=self.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.certificate is not None:
            context.load_cert_chain(self.certificate, self.key)
        return context


class Archive(Protocol):
    """What the rest of the package needs of an archive. Every method raises ArchiveError if the archive fails."""

    def find(self, match: Mapping[str, str]) -> list[FoundStudy]:
        """Return the studies with a CT that match attributes by keyword, such as `{"StudyDate": "20240101-"}`."""

    def fetch(self, study: str, folder: Path) -> int:
        """Write the CT images of a study into a folder, and return their number."""

    def store(self, objects: "Iterable[Dataset]") -> None:
        """Store objects. An archive that has an object keeps one copy of it."""


def open_archive(
    address: str,
    *,
    aet: str = "ICHPROG",
    retrieve: str = "get",
    receive_port: int = 11112,
    tls: TlsFiles | None = None,
) -> Archive:
    """Return the client of an archive. Nothing is sent yet.

    Args:
        address: Address in one of the forms of `ADDRESSES`.
        aet: Application entity title of this client.
        retrieve: "get" or "move": how the DICOM network protocol fetches. For "move", the archive must know this client
            with its title, host and port.
        receive_port: Port at which "move" receives.
        tls: Files of a connection with TLS.

    Raises:
        InvalidValueError: The address or `retrieve` has another form.
        IchprogError: pynetdicom or dicomweb-client is not installed.

    Examples:
        ```python
        archive = open_archive("dicom://PACS@127.0.0.1:4242")
        ```
    """
    parts = urlsplit(address)
    try:
        port = parts.port
    except ValueError:
        port = None
    if parts.scheme in ("http", "https") and parts.hostname:
        return WebArchive(address, tls or TlsFiles())
    if parts.scheme not in ("dicom", "dicoms") or not (parts.username and parts.hostname and port):
        raise InvalidValueError("archive", address, ADDRESSES)
    if retrieve not in ("get", "move"):
        raise InvalidValueError("retrieve", retrieve, "'get' or 'move'")
    secure = (tls or TlsFiles()) if parts.scheme == "dicoms" else None
    return NetworkArchive(
        parts.hostname, port, parts.username, aet, receive_port if retrieve == "move" else None, secure
    )


def _study(data: "Dataset") -> FoundStudy:
    count = str(data.get("NumberOfStudyRelatedInstances") or "0")
    return FoundStudy(
        str(data.get("StudyInstanceUID", "")), str(data.get("StudyDate") or ""),
        str(data.get("StudyDescription") or ""), int(count) if count.isdigit() else 0,
    )  # fmt: skip


class _Writer:
    """Write the images of a study into a folder, under numbers, so that no name comes from outside."""

    def __init__(self, folder: Path, study: str) -> None:
        self.folder, self.study, self.count = folder, study, 0
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, content: bytes, study: object) -> None:
        """Write an image, and refuse one of another study, which anybody could send."""
        if study != self.study:
            raise ArchiveError("an image of another study arrived.")
        if self.count >= MAX_DICOM_FILES or len(content) > MAX_DICOM_BYTES:
            raise ArchiveError(
                f"a study has more than {MAX_DICOM_FILES} images, or one larger than {MAX_DICOM_BYTES} bytes."
            )
        self.count += 1
        (self.folder / f"{self.count:05d}.dcm").write_bytes(content)


class NetworkArchive:
    """An archive by the DICOM network protocol.

    Args:
        host: Host of the archive.
        port: Port of the archive.
        called: Application entity title of the archive.
        aet: Title of this client.
        receive_port: Port at which C-MOVE receives; None to fetch by C-GET.
        tls: Files of a connection with TLS; None for one without.
    """

    def __init__(
        self, host: str, port: int, called: str, aet: str, receive_port: int | None, tls: TlsFiles | None
    ) -> None:
        try:
            import pynetdicom
        except ImportError as error:
            raise missing_extra("dicom", "pynetdicom", "The DICOM network protocol") from error
        del pynetdicom
        self._host, self._port, self._called, self._aet = host, port, called, aet
        self._receive_port, self._tls = receive_port, tls

    def find(self, match: Mapping[str, str]) -> list[FoundStudy]:
        """Return the studies with a CT that match attributes, as in `Archive`."""
        query = _query("STUDY", dict.fromkeys(_STUDY_KEYS, "") | {"ModalitiesInStudy": "CT"} | dict(match))
        return [_study(found) for found in self._find(query)]

    def fetch(self, study: str, folder: Path) -> int:
        """Write the CT images of a study into a folder, as in `Archive`."""
        keys = {"StudyInstanceUID": study, "SeriesInstanceUID": "", "Modality": "CT"}
        series = [str(found.SeriesInstanceUID) for found in self._find(_query("SERIES", keys))]
        writer = _Writer(folder, study)
        for uid in series:
            query = _query("SERIES", {"StudyInstanceUID": study, "SeriesInstanceUID": uid})
            (self._get if self._receive_port is None else self._move)(query, writer)
        if not writer.count:
            raise ArchiveError(f"{self._called}: no CT image of the study arrived. Check its identifier.")
        return writer.count

    def store(self, objects: "Iterable[Dataset]") -> None:
        """Store objects, as in `Archive`."""
        listed = list(objects)
        with self._associate(sorted({str(each.SOPClassUID) for each in listed})) as link:
            for each in listed:
                status = self._check(link.send_c_store(each), "C-STORE")
                if status and not 0xB000 <= status <= 0xBFFF:  # warnings
                    raise ArchiveError(f"{self._called}: refused to store an object, status 0x{status:04X}.")

    def _find(self, query: "Dataset") -> "list[Dataset]":
        from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as Model

        found = []
        with self._associate([Model]) as link:
            for answer, data in link.send_c_find(query, Model):
                status = self._check(answer, "C-FIND")
                if status in _PENDING and data is not None:
                    found.append(data)
                elif status:
                    raise ArchiveError(f"{self._called}: refused C-FIND, status 0x{status:04X}.")
        return found

    def _get(self, query: "Dataset", writer: _Writer) -> None:
        from pynetdicom import build_role, evt
        from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelGet as Model

        roles = [build_role(each, scp_role=True) for each in _image_classes()]
        handlers = [(evt.EVT_C_STORE, _receiver(writer))]
        with self._associate([Model, *_image_classes()], ext_neg=roles, evt_handlers=handlers) as link:
            self._finish(link.send_c_get(query, Model), "C-GET")

    def _move(self, query: "Dataset", writer: _Writer) -> None:
        from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, evt
        from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelMove as Model

        receiver = AE(ae_title=self._aet)
        receiver.require_called_aet, receiver.require_calling_aet = True, [self._called]
        for each in _image_classes():
            receiver.add_supported_context(each, ALL_TRANSFER_SYNTAXES)
        handlers = [(evt.EVT_C_STORE, _receiver(writer))]
        secure = None if self._tls is None else _server_context(self._tls)
        server = receiver.start_server(("", self._receive_port), block=False, evt_handlers=handlers, ssl_context=secure)
        try:
            with self._associate([Model]) as link:
                self._finish(link.send_c_move(query, self._aet, Model), "C-MOVE")
        finally:
            server.shutdown()

    def _finish(self, answers: Iterable[Any], request: str) -> None:
        """Wait for the end of a retrieval, and raise an error if an image is missing."""
        for answer, _ in answers:
            status = self._check(answer, request)
            if status not in (0, *_PENDING):
                raise ArchiveError(f"{self._called}: {request} ended with status 0x{status:04X}; images are missing.")

    def _check(self, answer: Any, request: str) -> int:
        """Return the status of an answer, or raise an error if the connection was lost."""
        if not answer or "Status" not in answer:
            raise ArchiveError(f"{self._called}: the connection was lost during {request}.")
        return int(answer.Status)

    @contextmanager
    def _associate(self, classes: Sequence[Any], **options: Any) -> Iterator[Any]:
        from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
        from pynetdicom import AE, ALL_TRANSFER_SYNTAXES

        entity = AE(ae_title=self._aet)
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = _TIMEOUT_S
        received = set(_image_classes()) if "ext_neg" in options else set()
        for each in classes:
            plain = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
            entity.add_requested_context(each, ALL_TRANSFER_SYNTAXES if each in received else plain)
        tls = None if self._tls is None else (self._tls.context(), self._host)
        try:
            link = entity.associate(self._host, self._port, ae_title=self._called, tls_args=tls, **options)
        except (OSError, RuntimeError) as error:
            raise ArchiveError(f"{self._called} at {self._host}:{self._port} cannot be reached: {error}.") from error
        if not link.is_established:
            raise ArchiveError(
                f"{self._called} at {self._host}:{self._port} cannot be reached, or refuses {self._aet}. Check its "
                f"address and title, {'the certificates, ' if tls else ''}and that the archive knows this client."
            )
        try:
            yield link
        except (RuntimeError, OSError) as error:
            if isinstance(error, ArchiveError):
                raise
            raise ArchiveError(f"{self._called}: the connection was lost: {error}.") from error
        finally:
            if link.is_established:
                link.release()


def _image_classes() -> tuple[Any, ...]:
    from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

    return CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage


def _receiver(writer: _Writer) -> Callable[[Any], int]:
    """Return the handler that writes each received image as it was sent."""

    def receive(event: Any) -> int:
        try:
            writer.write(event.encoded_dataset(), event.dataset.get("StudyInstanceUID"))
        except (ArchiveError, OSError):
            return 0xA700  # out of resources
        return 0

    return receive


def _server_context(tls: TlsFiles) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=tls.ca)
    if tls.certificate is not None:
        context.load_cert_chain(tls.certificate, tls.key)
    return context


def _query(level: str, keys: Mapping[str, str]) -> "Dataset":
    from pydicom.datadict import tag_for_keyword
    from pydicom.dataset import Dataset

    query = Dataset()
    query.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        if tag_for_keyword(keyword) is None:
            raise InvalidValueError("attribute to match", keyword, "a DICOM keyword, such as StudyDate")
        setattr(query, keyword, value)
    return query


def _trust(merge: Callable[..., dict[str, Any]], ca: str, *given: Any) -> dict[str, Any]:
    """Return the settings of a request, with one file of certificates whatever the environment names."""
    return merge(*given) | {"verify": ca}


class WebArchive:
    """An archive by DICOMweb. A login is read from `~/.netrc`.

    Args:
        address: Address of the service.
        tls: Files of a connection with TLS.
    """

    def __init__(self, address: str, tls: TlsFiles) -> None:
        try:
            import requests
            from dicomweb_client.api import DICOMwebClient
        except ImportError as error:
            raise missing_extra("dicom", "dicomweb-client", "DICOMweb") from error
        session = requests.Session()
        if tls.ca is not None:
            # A bundle of certificates in the environment would replace `session.verify`.
            merge = session.merge_environment_settings
            session.merge_environment_settings = partial(_trust, merge, str(tls.ca))  # type: ignore[method-assign]
        if tls.certificate is not None:
            session.cert = (str(tls.certificate), str(tls.key or tls.certificate))
        self._address, self._errors = address, (requests.RequestException, ValueError, LookupError)
        self._client = DICOMwebClient(address, session=session)
        self._client.set_http_retry_params(retry=False)

    def find(self, match: Mapping[str, str]) -> list[FoundStudy]:
        """Return the studies with a CT that match attributes, as in `Archive`."""
        from pydicom.dataset import Dataset

        _query("STUDY", match)  # refuses unknown keywords
        with self._requests("QIDO"):
            filters = {"ModalitiesInStudy": "CT", **match}
            found = self._client.search_for_studies(search_filters=filters, fields=list(_STUDY_KEYS))
            return [_study(Dataset.from_json(each)) for each in found]

    def fetch(self, study: str, folder: Path) -> int:
        """Write the CT images of a study into a folder, as in `Archive`."""
        from io import BytesIO

        from pydicom.dataset import Dataset

        writer = _Writer(folder, study)
        with self._requests("WADO"):
            found = self._client.search_for_series(study, search_filters={"Modality": "CT"})
            for each in found:
                for image in self._client.iter_series(study, str(Dataset.from_json(each).SeriesInstanceUID)):
                    buffer = BytesIO()
                    image.save_as(buffer, enforce_file_format=True)
                    writer.write(buffer.getvalue(), image.get("StudyInstanceUID"))
        if not writer.count:
            raise ArchiveError(f"{self._address}: no CT image of the study arrived. Check its identifier.")
        return writer.count

    def store(self, objects: "Iterable[Dataset]") -> None:
        """Store objects, as in `Archive`."""
        for each in objects:
            with self._requests("STOW"):
                answer = self._client.store_instances([each])
            if answer.get("FailedSOPSequence"):
                raise ArchiveError(f"{self._address}: refused to store an object.")

    @contextmanager
    def _requests(self, request: str) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            if isinstance(error, InvalidValueError):
                raise
            raise ArchiveError(f"{self._address}: {request} failed: {error}.") from error
