"""Answer the studies of an archive: fetch a study, predict, and store the objects, once or for every new head CT."""

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ichprog
from ichprog.errors import ScanError
from ichprog.pacs.archive import Archive, ArchiveError
from ichprog.pacs.journal import StudyJournal
from ichprog.pseudonyms import pseudonym

if TYPE_CHECKING:
    from ichprog.model import Model
    from ichprog.results import Prediction
    from ichprog.scan.brain import Brain

_LOG = logging.getLogger("ichprog.pacs")


def answer_study(
    archive: Archive,
    study: str,
    model: "Model",
    *,
    haemorrhage: "bool | Model" = False,
    methods: Sequence[str] = (),
    brain: "Brain" = "auto",
) -> "Prediction":
    """Fetch a study, predict its head CT, and store the objects.

    Repeating stores the same objects, of which an archive keeps one copy.

    Args:
        archive: The archive.
        study: Study Instance UID.
        model: The model.
        haemorrhage: As in `predict`.
        methods: Saliency methods of the maps; the task is the model's first.
        brain: As in `predict`.

    Returns:
        The prediction. Its scan is named by the pseudonym of the study.

    Raises:
        ScanError: The study holds no head CT that can be predicted.
        ArchiveError: The archive cannot be reached, or refuses a request.
    """
    from ichprog.export.dicom import build_objects

    with tempfile.TemporaryDirectory(prefix="ichprog-pacs-") as scratch:
        folder = Path(scratch) / f"study-{pseudonym(study)}"
        archive.fetch(study, folder)
        scan = model.load_scan(folder, brain=brain)
        prediction = ichprog.predict(model, scan, haemorrhage=haemorrhage)
        maps = ichprog.explain(model, scan, task=[model.spec.tasks[0].name], method=list(methods)) if methods else {}
        objects = build_objects(prediction, scan, folder, maps=list(maps.values()))
        archive.store(objects.values())
    return prediction


@dataclass
class WatchState:
    """What a watch reports while it runs.

    Attributes:
        last_poll: `time.monotonic` of the last question that the archive answered; None before the first.
        archive_error: Why the archive did not answer the last question, or "".
        stored: Number of studies answered since the start.
        seconds: Seconds that the answers took together.
    """

    last_poll: float | None = None
    archive_error: str = ""
    stored: int = 0
    seconds: float = 0.0


@dataclass
class Watch:
    """Answer every new head CT of an archive.

    Studies that wait are in the journal, which survives a kill. The archive is asked for more only while fewer than
    `queue_size` studies wait. A study is taken when its number of images has not changed for `settle_s`. If the archive
    fails, the study waits for the next try. If the study cannot be predicted, it fails with the reason.

    Attributes:
        archive: The archive.
        answer: Function that answers a study, by its Study Instance UID.
        journal: The journal.
        match: Attributes that studies must match, as in `Archive.find`.
        queue_size: Largest number of studies that wait.
        settle_s: Seconds without a change after which a study is taken as complete.
        max_attempts: Attempts after which a study fails, if the archive answers but the study cannot be had.
        state: What a watch reports while it runs.
    """

    archive: Archive
    answer: Callable[[str], Any]
    journal: StudyJournal
    match: Mapping[str, str] = field(default_factory=dict)
    queue_size: int = 32
    settle_s: float = 60.0
    max_attempts: int = 20
    state: WatchState = field(default_factory=WatchState)
    _growing: dict[str, tuple[int, float]] = field(default_factory=dict)

    def run(self, stop: threading.Event, *, interval_s: float) -> None:
        """Poll and answer until an event is set.

        Args:
            stop: The event.
            interval_s: Seconds between two questions to the archive while no study waits.
        """
        while not stop.is_set():
            is_reached = self.poll()
            if not (is_reached and self.answer_next()):
                stop.wait(interval_s)

    def poll(self) -> bool:
        """Ask the archive for studies and add complete ones to the journal; return whether the archive answered."""
        space = self.queue_size - len(self.journal.waiting())
        if space <= 0:
            return True
        try:
            found = self.archive.find(self.match)
        except ArchiveError as error:
            self.state.archive_error = str(error)
            _LOG.warning("%s", error)
            return False
        self.state.last_poll, self.state.archive_error = time.monotonic(), ""
        unknown = [study for study in found if study.uid and not self.journal.is_known(study.uid)]
        self._growing = {study.uid: self._change(study.uid, study.instances) for study in unknown}
        now = time.monotonic()
        complete = [uid for uid, (_, since) in self._growing.items() if now - since >= self.settle_s]
        for uid in complete[:space]:
            self.journal.add(uid)
        return True

    def _change(self, uid: str, instances: int) -> tuple[int, float]:
        """Return the number of images of a study, and since when it has that many."""
        known = self._growing.get(uid)
        return known if known is not None and known[0] == instances else (instances, time.monotonic())

    def answer_next(self) -> bool:
        """Answer the study that waits, and return whether one was answered or failed for good."""
        waiting = self.journal.waiting()
        if not waiting:
            return False
        uid, start = waiting[0], time.monotonic()
        attempts = self.journal.attempt(uid)
        try:
            self.answer(uid)
        except ScanError as error:
            _LOG.warning("study %s: %s", pseudonym(uid), error.code)
            self.journal.set_state(uid, "failed", error.code)
        except ArchiveError as error:
            _LOG.warning("study %s waits: %s", pseudonym(uid), error)
            state = "failed" if attempts >= self.max_attempts else "waiting"
            self.journal.set_state(uid, state, str(error))
            return state == "failed"
        except Exception as error:  # one study must not stop the others
            _LOG.exception("study %s", pseudonym(uid))
            self.journal.set_state(uid, "failed", f"{type(error).__name__}: {error}")
        else:
            self.journal.set_state(uid, "answered")
            self.state.stored += 1
            self.state.seconds += time.monotonic() - start
        return True
