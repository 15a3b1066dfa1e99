"""An endpoint on the loopback with the health and the metrics of a watch."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ichprog.pacs.watch import Watch


def metrics(watch: Watch) -> str:
    """Return the metrics of a watch in the text format of Prometheus.

    Args:
        watch: The watch.
    """
    state = watch.state
    lines = ["# HELP ichprog_studies Studies in the journal, by state.", "# TYPE ichprog_studies gauge"]
    lines += [f'ichprog_studies{{state="{name}"}} {count}' for name, count in watch.journal.counts().items()]
    for name, kind, text, value in (
        ("ichprog_queue_size", "gauge", "Largest number of studies that wait.", watch.queue_size),
        ("ichprog_archive_up", "gauge", "Whether the archive answered the last question.", int(_is_up(watch))),
        ("ichprog_answered_total", "counter", "Studies answered since the start.", state.stored),
        ("ichprog_answer_seconds_total", "counter", "Seconds that the answers took together.", round(state.seconds, 3)),
    ):
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", f"{name} {value}"]
    return "\n".join(lines) + "\n"


def _is_up(watch: Watch) -> bool:
    return watch.state.last_poll is not None and not watch.state.archive_error


def health(watch: Watch) -> dict[str, object]:
    """Return the health of a watch as plain data.

    Args:
        watch: The watch.
    """
    last = watch.state.last_poll
    return {
        "status": "ok" if _is_up(watch) else "archive not reached",
        "seconds_since_poll": None if last is None else round(time.monotonic() - last, 1),
        "studies": watch.journal.counts(),
    }


@contextmanager
def serve(watch: Watch, port: int) -> Iterator[int]:
    """Serve `/health` and `/metrics` on the loopback while the block runs.

    Args:
        watch: The watch.
        port: Port; 0 for a free one.

    Yields:
        The port.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._send(200, "text/plain; version=0.0.4", metrics(watch))
            elif self.path == "/health":
                found = health(watch)
                self._send(200 if found["status"] == "ok" else 503, "application/json", json.dumps(found))
            else:
                self._send(404, "text/plain", "Expected /health or /metrics.\n")

        def _send(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, name="ichprog-endpoint", daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
