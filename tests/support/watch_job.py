"""Watch an archive in a process that a test kills: by the real command, or with a small stand-in for predictions.

The arguments are those of `ichprog`, or `small ARCHIVE JOURNAL`.
"""

import sys
import tempfile
import threading
from pathlib import Path


def run_command():
    """Run the command line with the backbone "intensity" registered."""
    from ichprog import registry
    from ichprog.cli import run

    from support.models import intensity_backbone

    registry.register_backbone("intensity", intensity_backbone)
    sys.argv[0] = "ichprog"
    run()


def watch_small(address, journal_path):
    """Answer every study with one small image, which refers to what was fetched."""
    from pydicom import dcmread
    from pydicom.uid import SecondaryCaptureImageStorage

    from ichprog.pacs import Watch, open_archive, open_journal

    archive = open_archive(address)

    def answer(study):
        with tempfile.TemporaryDirectory() as folder:
            count = archive.fetch(study, Path(folder))
            data = dcmread(Path(folder) / "00001.dcm")
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"{study}.9.1"
        data.SeriesInstanceUID, data.Modality, data.SeriesDescription = f"{study}.9", "OT", f"{count} images"
        archive.store([data])

    with open_journal(Path(journal_path)) as journal:
        watch = Watch(archive, answer, journal, queue_size=8, settle_s=2.0)
        watch.run(threading.Event(), interval_s=0.3)


if __name__ == "__main__":
    watch_small(*sys.argv[2:]) if sys.argv[1] == "small" else run_command()
