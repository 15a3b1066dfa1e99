"""Start Orthanc, a picture archive, on the loopback."""

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from pathlib import Path

PROGRAM = shutil.which("Orthanc")
_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def free_port():
    """Return a port of the loopback that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def decrypt(context, port):
    """Forward encrypted connections to a port of the loopback, and return the socket that accepts them."""

    def copy(source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def forward(plain):
        with contextlib.suppress(OSError), plain:  # OSError: the client does not trust the certificate
            client = context.wrap_socket(plain, server_side=True)
            with client, socket.create_connection(("127.0.0.1", port)) as server:
                back = threading.Thread(target=copy, args=(server, client))
                back.start()
                copy(client, server)
                back.join()

    def serve():
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                threading.Thread(target=forward, args=(listener.accept()[0],), daemon=True).start()

    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, daemon=True).start()
    return listener


class Orthanc:
    """An archive in a folder. It can be killed and started again, and keeps what it had stored.

    With `tls`, a pair of an authority and a certificate of trustme, the DICOM network protocol is encrypted and asks
    for a certificate of the client, and DICOMweb is reached through a proxy that decrypts, as in many hospitals.
    """

    def __init__(self, folder, *, move_port=None, tls=None):
        self.folder, self.http, self.dicom = folder, free_port(), free_port()
        self.move_port, self.tls = move_port, tls
        folder.mkdir(parents=True)
        remote = {"AET": "ICHPROG", "Host": "127.0.0.1", "Port": move_port, "UseDicomTls": tls is not None}
        modalities = {} if move_port is None else {"ichprog": remote}
        config = {
            "Name": "test", "HttpPort": self.http, "DicomPort": self.dicom, "DicomAet": "ORTHANC",
            "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
            "Plugins": [str(_PLUGIN)] if _PLUGIN.exists() else [], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "DicomModalities": modalities,
            "DicomAlwaysAllowFind": True, "DicomAlwaysAllowGet": True, "DicomAlwaysAllowMove": True,
            "DicomCheckCalledAet": False, "SaveJobs": False, "ConcurrentJobs": 1,
        }  # fmt: skip
        self.proxy = None
        if tls is not None:
            authority, certificate = tls
            own = str(folder / "server.pem")
            authority.cert_pem.write_to_path(folder / "ca.pem")
            certificate.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
            config |= {
                "DicomTlsEnabled": True, "DicomTlsCertificate": own, "DicomTlsPrivateKey": own,
                "DicomTlsTrustedCertificates": str(folder / "ca.pem"), "DicomTlsRemoteCertificateRequired": True,
            }  # fmt: skip
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            certificate.configure_cert(context)
            self.proxy = decrypt(context, self.http)
        (folder / "orthanc.json").write_text(json.dumps(config))
        self.process = None

    has_web = _PLUGIN.exists()

    @property
    def network_address(self):
        return f"dicom{'s' if self.tls else ''}://ORTHANC@127.0.0.1:{self.dicom}"

    @property
    def web_address(self):
        secure = self.proxy and self.proxy.getsockname()[1]
        address = f"https://127.0.0.1:{secure}" if secure else f"http://127.0.0.1:{self.http}"
        return f"{address}/dicom-web"

    def start(self):
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen([PROGRAM, self.folder / "orthanc.json"], stdout=log, stderr=log)
        for _ in range(300):
            try:
                self.ask("system")
                return self
            except OSError:
                assert self.process.poll() is None, (self.folder / "log.txt").read_text()
                time.sleep(0.1)
        raise AssertionError("Orthanc did not start in 30 seconds")

    def kill(self):
        """Kill the process. An archive with TLS cannot be started again."""
        if self.proxy is not None:
            self.proxy.shutdown(socket.SHUT_RDWR)
            self.proxy.close()
        self.process.kill()
        self.process.wait()

    def ask(self, path):
        return json.loads(self._read(path))

    def _read(self, path, content=None):
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}/{path}", content)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()

    def upload(self, content):
        """Store a DICOM file by Orthanc's own interface, not by the code under test."""
        return json.loads(self._read("instances", content))

    def instances(self):
        """Return the tags of every instance that Orthanc holds."""
        return [each["MainDicomTags"] | {"id": each["ID"]} for each in self.ask("instances?expand")]

    def series(self):
        """Return modality and description of every series with the study and the number of instances."""
        return [
            (each["ParentStudy"], each["MainDicomTags"].get("Modality"), len(each["Instances"]))
            for each in self.ask("series?expand")
        ]

    def download(self, instance):
        return self._read(f"instances/{instance}/file")
