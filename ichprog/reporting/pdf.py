"""Write a report as a PDF of one page, through the headless Chromium or Chrome of this machine."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ichprog.errors import IchprogError
from ichprog.io import atomic_write

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_TIMEOUT_S = 120
_ZOOMS = (1.0, 0.85, 0.72, 0.6)  # until everything fits on one page


def find_chromium() -> str:
    """Return the path of Chromium or Chrome.

    Raises:
        IchprogError: None is on the PATH.
    """
    for program in PROGRAMS:
        if found := shutil.which(program):
            return found
    raise IchprogError(
        "A PDF needs Chromium or Google Chrome, and none is on the PATH. Install one, on Debian or Ubuntu with "
        "`apt install chromium`, or leave out --pdf: a browser prints the HTML report on one page, too."
    )


def write_pdf(html: str, target: Path) -> Path:
    """Print a page as PDF, whole or not at all.

    The page is made smaller until it fits on one sheet of A4, at most to 60 %.

    Args:
        html: The page.
        target: PDF file.

    Returns:
        The path.

    Raises:
        IchprogError: Chromium is not installed, or prints nothing.
    """
    program = find_chromium()
    with tempfile.TemporaryDirectory(prefix="ichprog-pdf-") as folder:
        page, printed = Path(folder) / "page.html", Path(folder) / "page.pdf"
        for zoom in _ZOOMS:
            page.write_text(html.replace("<html ", f'<html style="zoom: {zoom:g}" ', 1), encoding="utf-8")
            _print(program, page, printed, Path(folder) / "profile")
            content = printed.read_bytes()
            if count_pages(content) <= 1:
                break
    with atomic_write(target, sole_writer=True) as partial:
        partial.write_bytes(content)
    return target


def count_pages(pdf: bytes) -> int:
    """Return the number of pages of a PDF that Chromium wrote.

    Args:
        pdf: Content of the file.
    """
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


def _print(program: str, page: Path, printed: Path, profile: Path) -> None:
    printed.unlink(missing_ok=True)
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium has no sandbox for root
    command = [
        program, "--headless=new", "--disable-gpu", "--no-first-run", "--disable-extensions", "--no-pdf-header-footer",
        *(["--no-sandbox"] if is_root else []), f"--user-data-dir={profile}", f"--print-to-pdf={printed}",
        page.as_uri(),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)  # noqa: S603
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = [str(error)]
    if not printed.is_file():
        raise IchprogError(f"{program} printed no PDF: {reason[0]}. Leave out --pdf, or print the HTML report.")
