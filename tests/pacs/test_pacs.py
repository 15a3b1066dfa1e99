"""Results go into a real archive, once for each study, whatever is killed meanwhile."""

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

import pytest
from click.testing import CliRunner
from pydicom import dcmread

import ichprog
from ichprog.cli import main
from ichprog.errors import InvalidValueError, RunError, ScanError

from support.dicom_series import write
from support.models import SHARED, local_detector
from support.orthanc import PROGRAM, Orthanc, free_port

pytest.importorskip("pynetdicom")
pytest.importorskip("dicomweb_client")
from ichprog.pacs import ArchiveError, FoundStudy, Watch, answer_study, open_archive, open_journal
from ichprog.pacs.endpoint import serve

pytestmark = pytest.mark.usefixtures("registered_intensity_backbone", "one_thread")
needs_orthanc = pytest.mark.skipif(PROGRAM is None, reason="needs Orthanc, of the package orthanc")
SMALL = {"count": 12, "gaps": 10.0}  # geometry of a series
OBJECTS = {"SEG": 2, "SR": 1, "OT": 1}


@pytest.fixture(scope="module")
def detector(tmp_path_factory, registered_intensity_backbone):
    return ichprog.load_model(local_detector(tmp_path_factory.mktemp("models") / "detector"), runtime="torch")


@pytest.fixture(scope="module")
def archive_program(tmp_path_factory):
    orthanc = Orthanc(tmp_path_factory.mktemp("archive") / "orthanc", move_port=free_port())
    orthanc.start()
    yield orthanc
    orthanc.kill()


def add_study(orthanc, folder, uid, **tags):
    for file in write(
        folder, tags={"StudyInstanceUID": uid, "PatientID": f"P{uid}", "PatientName": "A^B", **tags}, **SMALL
    ):
        data = dcmread(file)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID
        buffer = BytesIO()
        data.save_as(buffer)
        orthanc.upload(buffer.getvalue())


def results_of(orthanc, uid):
    """Return the number of result instances of a study by modality, as Orthanc counts them."""
    (study,) = [
        each["ID"] for each in orthanc.ask("studies?expand") if each["MainDicomTags"]["StudyInstanceUID"] == uid
    ]
    counts = {}
    for parent, modality, number in orthanc.series():
        if parent == study and modality != "CT":
            counts[modality] = counts.get(modality, 0) + number
    return counts


def connect(orthanc, kind):
    if kind == "web":
        if not orthanc.has_web:
            pytest.skip("needs the DICOMweb plugin of Orthanc, of the package orthanc-dicomweb")
        return open_archive(orthanc.web_address)
    if kind == "move":
        return open_archive(orthanc.network_address, retrieve="move", receive_port=orthanc.move_port)
    return open_archive(orthanc.network_address)


@needs_orthanc
@pytest.mark.parametrize("kind", ["get", "move", "web"])
def test_a_study_makes_the_round_trip_once(archive_program, detector, tmp_path, kind):
    uid = f"1.2.3.{['get', 'move', 'web'].index(kind) + 1}"
    add_study(archive_program, tmp_path / "series", uid, StudyDate="20240102")
    archive = connect(archive_program, kind)
    (found,) = [study for study in archive.find({"StudyDate": "20240101-20240103"}) if study.uid == uid]
    assert (found.date, found.instances) == ("20240102", 12)
    assert uid not in [study.uid for study in archive.find({"StudyDate": "20250101-"})]
    assert archive.fetch(uid, tmp_path / "fetched") == 12
    sent = {
        dcmread(file).SOPInstanceUID: dcmread(file).pixel_array.tobytes() for file in (tmp_path / "series").iterdir()
    }
    got = {
        dcmread(file).SOPInstanceUID: dcmread(file).pixel_array.tobytes() for file in (tmp_path / "fetched").iterdir()
    }
    assert got == sent
    for _ in range(2):  # the second time, the archive has the objects
        prediction = answer_study(archive, uid, detector, haemorrhage=detector, brain="given")
        assert results_of(archive_program, uid) == OBJECTS
    assert uid not in json.dumps(prediction.to_dict())


@needs_orthanc
def test_the_stored_objects_are_those_of_the_files(archive_program, detector, tmp_path):
    uid = "1.2.3.9"
    add_study(archive_program, tmp_path / "series", uid)
    archive = connect(archive_program, "get")
    answer_study(archive, uid, detector, haemorrhage=detector, brain="given")
    stored = [dcmread(BytesIO(archive_program.download(each["id"]))) for each in archive_program.instances()]
    (page,) = [each for each in stored if each.StudyInstanceUID == uid and each.Modality == "OT"]
    assert page.SeriesDescription.endswith("FOR RESEARCH ONLY")
    assert page.PatientID == f"P{uid}"
    assert page.pixel_array.ndim == 3


@needs_orthanc
@pytest.mark.skipif(not (SHARED / "head_ct_ge_dicom.zip").exists(), reason="needs the real tilted series")
def test_a_real_tilted_series_makes_the_round_trip(archive_program, detector, tmp_path):
    shutil.unpack_archive(SHARED / "head_ct_ge_dicom.zip", tmp_path)
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file.read_bytes()[128:132] == b"DICM"]
    for file in files:
        archive_program.upload(file.read_bytes())
    uid = str(dcmread(files[0]).StudyInstanceUID)
    answer_study(connect(archive_program, "get"), uid, detector)
    assert results_of(archive_program, uid) == {"SEG": 1, "SR": 1, "OT": 1}


@needs_orthanc
def test_the_commands_find_predict_and_send(archive_program, tmp_path):
    uid = "1.2.3.20"
    add_study(archive_program, tmp_path / "series", uid, StudyDate="20230101")
    address, model = archive_program.network_address, local_detector(tmp_path / "model")

    def run(*arguments):
        result = CliRunner().invoke(main, ["pacs", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    found = json.loads(run("find", address, "--match", "StudyDate=20230101", "--json"))
    assert [study["uid"] for study in found] == [uid]
    assert "12 images" in run("fetch", address, uid, "-o", tmp_path / "fetched")
    printed = run("predict", address, uid, "-m", model, "--runtime", "torch", "--brain", "given")
    assert "bleeding present" in printed
    assert uid not in printed
    assert results_of(archive_program, uid) == {"SEG": 1, "SR": 1, "OT": 1}
    file = next((tmp_path / "series").iterdir())
    assert "1 objects stored" in run("send", address, file)


class FakeArchive:
    """An archive in memory that fails on request, for tests of the watch alone."""

    def __init__(self, count=0):
        self.studies = {f"1.{n}": 5 for n in range(count)}
        self.is_down = False

    def find(self, match):
        if self.is_down:
            raise ArchiveError("down")
        return [FoundStudy(uid, "", "", count) for uid, count in self.studies.items()]


def test_a_watch_waits_for_complete_studies_and_bounds_its_queue(tmp_path):
    archive, answered = FakeArchive(5), []
    with open_journal(tmp_path / "journal.sqlite") as journal:
        watch = Watch(archive, answered.append, journal, queue_size=2, settle_s=0.2)
        watch.poll()
        assert journal.waiting() == []  # none is complete yet
        archive.studies["1.0"] = 6  # still arrives
        time.sleep(0.25)
        watch.poll()
        assert journal.waiting() == ["1.1", "1.2"]
        while watch.poll() and len(answered) < 5:
            watch.answer_next()
            time.sleep(0.05)
        assert sorted(answered) == [f"1.{n}" for n in range(5)]
        watch.poll()
        assert not watch.answer_next()


def test_a_watch_continues_after_a_kill_and_an_outage(tmp_path):
    archive, answered = FakeArchive(3), []

    def answer(uid):
        if archive.is_down:
            raise ArchiveError("down")
        if uid == "1.1":
            raise ScanError("no head", code="no-ct")
        answered.append(uid)

    path = tmp_path / "journal.sqlite"
    with open_journal(path) as journal:
        watch = Watch(archive, answer, journal, settle_s=0)
        assert watch.poll()
        archive.is_down = True
        assert not watch.answer_next()
        assert not watch.poll() or not watch.answer_next()
        assert journal.counts() == {"waiting": 3, "answered": 0, "failed": 0}
        with pytest.raises(RunError, match="another process"), open_journal(path):
            pass
    archive.is_down = False
    with open_journal(path) as journal:
        watch = Watch(archive, answer, journal, settle_s=0)
        while watch.poll() and watch.answer_next():
            pass
        assert sorted(answered) == ["1.0", "1.2"]
        assert journal.counts() == {"waiting": 0, "answered": 2, "failed": 1}
        journal.retry_failed()
        assert journal.waiting() == ["1.1"]
        answered.clear()
        Watch(FakeArchive(3), answered.append, journal, settle_s=0).answer_next()
        assert answered == ["1.1"]


def test_a_study_that_never_arrives_fails_at_last(tmp_path):
    def answer(uid):
        raise ArchiveError("no image arrived")

    with open_journal(tmp_path / "journal.sqlite") as journal:
        watch = Watch(FakeArchive(1), answer, journal, settle_s=0, max_attempts=3)
        watch.poll()
        assert [watch.answer_next() for _ in range(3)] == [False, False, True]
        assert journal.counts()["failed"] == 1


def test_a_file_that_is_no_journal_is_refused(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("scan,model\n" * 100)
    with pytest.raises(RunError, match="no journal"), open_journal(path):
        pass


def test_the_endpoint_tells_health_and_metrics_on_the_loopback(tmp_path):
    archive, stop = FakeArchive(2), threading.Event()
    with open_journal(tmp_path / "journal.sqlite") as journal:
        watch = Watch(archive, lambda uid: None, journal, settle_s=0)

        def ask(port, path):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=5) as answer:
                return answer.read().decode()

        with serve(watch, 0) as port:
            with pytest.raises(urllib.error.HTTPError, match="503"):
                ask(port, "health")
            thread = threading.Thread(target=watch.run, args=(stop,), kwargs={"interval_s": 0.02})
            thread.start()
            for _ in range(100):
                if 'ichprog_studies{state="answered"} 2' in ask(port, "metrics"):
                    break
                time.sleep(0.02)
            stop.set()
            thread.join()
            assert 'ichprog_studies{state="answered"} 2' in ask(port, "metrics")
            assert "ichprog_archive_up 1" in ask(port, "metrics")
            assert json.loads(ask(port, "health"))["status"] == "ok"
            with pytest.raises(urllib.error.HTTPError, match="404"):
                ask(port, "else")


@pytest.mark.parametrize(
    "address", ["ftp://host", "dicom://host:104", "dicom://A@host", "dicom://A@host:port", "https://"]
)
def test_another_form_of_address_is_refused(address):
    with pytest.raises(InvalidValueError, match="dicom://AET@HOST:PORT"):
        open_archive(address)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a socket of pynetdicom stays open
def test_an_archive_that_is_not_there_is_named(tmp_path):
    port = free_port()
    for address in (f"dicom://PACS@127.0.0.1:{port}", f"http://127.0.0.1:{port}/dicom-web"):
        with pytest.raises(ArchiveError, match=r"127\.0\.0\.1"):
            open_archive(address).find({})
    with pytest.raises(InvalidValueError, match="StudyDay"):
        open_archive(f"dicom://PACS@127.0.0.1:{port}").find({"StudyDay": "1"})


def send_studies(orthanc, files, uids):
    """Send a study for each identifier, and each image until the archive has it, whatever is killed meanwhile."""
    for number, uid in enumerate(uids):
        for n, file in enumerate(files):
            data = dcmread(file)
            data.StudyInstanceUID, data.SeriesInstanceUID, data.PatientID = uid, f"{uid}.1", f"P{number}"
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{uid}.1.{n}"
            buffer = BytesIO()
            data.save_as(buffer)
            while True:
                try:
                    orthanc.upload(buffer.getvalue())
                    break
                except OSError:
                    time.sleep(0.3)


def count_states(path):
    """Return the number of studies in each state, from the file of a journal alone."""
    base = sqlite3.connect(path)
    try:
        return dict(base.execute("SELECT state, COUNT(*) FROM studies GROUP BY state"))
    except sqlite3.OperationalError:  # no table yet, or locked
        return {}
    finally:
        base.close()


@needs_orthanc
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["small", "command"])
def test_every_study_is_answered_once_while_the_archive_and_the_watch_are_killed(tmp_path, kind):
    studies, kills = map(int, os.environ.get("ICHPROG_KILLS", "200,20").split(","))
    orthanc, chance = Orthanc(tmp_path / "orthanc").start(), random.Random(0)
    uids = [f"1.2.3.4.{n}" for n in range(1, studies + 1)]
    geometry = {"count": 2, "gaps": 10.0} if kind == "small" else SMALL
    files = write(tmp_path / "series", tags={"PatientName": "A^B"}, **geometry)
    sender = threading.Thread(target=send_studies, args=(orthanc, files, uids), daemon=True)
    sender.start()
    journal = tmp_path / "journal.sqlite"
    command = [sys.executable, "-m", "support.watch_job"]
    if kind == "small":
        command += ["small", orthanc.network_address, journal]
    else:
        command += [
            "pacs", "watch", orthanc.network_address, "-m", local_detector(tmp_path / "model"), "--runtime", "torch",
            "--brain", "given", "--journal", journal, "--interval", "0.5", "--settle", "3", "--queue", "5",
        ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def start_watch():
        with (tmp_path / "watch.txt").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    watch, done, deadline = start_watch(), 0, time.monotonic() + 120 * studies
    while (answered := count_states(journal).get("answered", 0)) < studies or done < kills:
        assert time.monotonic() < deadline, (count_states(journal), (tmp_path / "watch.txt").read_text()[-2000:])
        time.sleep(chance.uniform(0.1, 1.0))
        if done < kills and answered >= done * studies // (kills + 1):  # the kills are spread over the work
            done += 1
            if done % 2:
                watch.kill()
                watch.wait()
                watch = start_watch()
            else:
                orthanc.kill()
                time.sleep(chance.uniform(0, 1))
                orthanc.start()
    watch.terminate()
    watch.wait(timeout=120)
    assert count_states(journal) == {"answered": studies}
    for uid in uids:
        assert results_of(orthanc, uid) == ({"OT": 1} if kind == "small" else {"SEG": 1, "SR": 1, "OT": 1})
    print(f"{studies} studies answered once each, {done} kills")
    orthanc.kill()
