"""Start Orthanc, a picture archive, on the loopback."""

import json
import shutil
import socket
import subprocess
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


class Orthanc:
    """An archive in a folder. It can be killed and started again, and keeps what it had stored."""

    def __init__(self, folder, *, move_port=None):
        self.folder, self.http, self.dicom = folder, free_port(), free_port()
        folder.mkdir(parents=True)
        modalities = {} if move_port is None else {"ichprog": ["ICHPROG", "127.0.0.1", move_port]}
        config = {
            "Name": "test", "HttpPort": self.http, "DicomPort": self.dicom, "DicomAet": "ORTHANC",
            "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"),
            "Plugins": [str(_PLUGIN)] if _PLUGIN.exists() else [], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
            "RemoteAccessAllowed": False, "AuthenticationEnabled": False, "DicomModalities": modalities,
            "DicomAlwaysAllowFind": True, "DicomAlwaysAllowGet": True, "DicomAlwaysAllowMove": True,
            "DicomCheckCalledAet": False, "SaveJobs": False, "ConcurrentJobs": 1,
        }  # fmt: skip
        (folder / "orthanc.json").write_text(json.dumps(config))
        self.process = None

    has_web = _PLUGIN.exists()

    @property
    def network_address(self):
        return f"dicom://ORTHANC@127.0.0.1:{self.dicom}"

    @property
    def web_address(self):
        return f"http://127.0.0.1:{self.http}/dicom-web"

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
        self.process.kill()
        self.process.wait()

    def ask(self, path):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/{path}", timeout=10) as answer:
            return json.loads(answer.read())

    def upload(self, content):
        """Store a DICOM file by Orthanc's own interface, not by the code under test."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}/instances", content)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

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
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/instances/{instance}/file", timeout=30) as answer:
            return answer.read()
