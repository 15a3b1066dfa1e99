"""Fixtures of the tests of the command line."""

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from ichprog.cli import main

from support.phantoms import brain_hu


@pytest.fixture
def run():
    """Run a command in this process and check its exit code."""

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


@pytest.fixture
def small_scan(tmp_path):
    """Path of a small scan whose in-plane spacing is doubtful."""
    path = tmp_path / "small.nii.gz"
    nib.Nifti1Image(brain_hu((96, 96, 30)), np.diag([-2.5, -2.5, 5, 1])).to_filename(path)
    return path
