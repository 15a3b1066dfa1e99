"""Predict the head CTs of a picture archive (PACS) and store the results in it.

`archive` has the clients of an archive, `watch` answers its studies, `journal` remembers which are answered, and
`endpoint` serves health and metrics.
"""

from ichprog.pacs.archive import ADDRESSES, Archive, ArchiveError, FoundStudy, TlsFiles, open_archive
from ichprog.pacs.journal import StudyJournal, open_journal
from ichprog.pacs.watch import Watch, answer_study

__all__ = [
    "ADDRESSES", "Archive", "ArchiveError", "FoundStudy", "StudyJournal", "TlsFiles", "Watch", "answer_study",
    "open_archive", "open_journal",
]  # fmt: skip
