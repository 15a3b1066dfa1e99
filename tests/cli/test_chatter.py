"""Standard error has no messages of other libraries."""

import logging
import struct
import subprocess
import sys
import warnings

import nibabel as nib
import numpy as np
import pytest


@pytest.fixture
def odd_scan(tmp_path):
    """Return a scan whose header nibabel repairs with a message."""
    path = tmp_path / "odd.nii"
    nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.diag([-1.0, -1.0, 5.0, 1.0])).to_filename(path)
    content = bytearray(path.read_bytes())
    content[252:254] = struct.pack("<h", 77)  # qform_code
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("options", [[], ["-v"]], ids=["quiet", "verbose"])
def test_a_repaired_header_is_announced_only_with_the_verbose_option(odd_scan, tmp_path, options):
    command = [sys.executable, "-m", "ichprog", *options, "scans", str(odd_scan), "--volumes", str(tmp_path / "out")]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert ("qform_code" in said) == bool(options)
    assert options or not said


def test_a_command_restores_levels_and_filters(run):
    before = list(warnings.filters), logging.getLogger("nibabel.global").level
    run("models")
    assert (list(warnings.filters), logging.getLogger("nibabel.global").level) == before
