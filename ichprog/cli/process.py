"""Shortcuts for a process that runs one command and ends. Only this process takes them, the library never does."""

import gc
import importlib
import os
import sys

import click

_state = {"is_command_process": False}


def run(command: click.Command) -> None:
    """Run a command and end the process as soon as its output is flushed.

    The interpreter's shutdown would destroy a loaded model and its threads object by object. Skipping this destruction
    saves about a sixth of the processor time of a short prediction. A process that imported torch shuts down normally,
    because torch may have its own work to do at exit.

    The garbage collector runs less often, because imports create many objects that live until the end of the process.
    OpenVINO is imported without its converter tools, which are slow to import. No command uses them.
    """
    _state["is_command_process"] = True
    gc.set_threshold(100_000)
    sys.modules["openvino.tools.ovc"] = None  # type: ignore[assignment]  # OpenVINO allows for its absence
    try:
        command()
    except SystemExit as end:
        if "torch" in sys.modules or not isinstance(end.code, int):
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code)


def import_nibabel() -> None:
    """Import nibabel without pydicom, if this process runs one command.

    nibabel imports pydicom for NIfTI headers that embed DICOM, which no command reads. Skipping that import
    saves about a quarter of the processor time of a short prediction. DICOM scans import pydicom later.
    """
    if not _state["is_command_process"] or {"nibabel", "pydicom"} & sys.modules.keys():
        return
    sys.modules["pydicom"] = None  # type: ignore[assignment]  # Python then reports pydicom as missing
    try:
        importlib.import_module("nibabel")
    finally:
        del sys.modules["pydicom"]
