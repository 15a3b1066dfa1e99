"""The extractors run the command they find on the PATH; the commands are stand-ins written by the tests."""

import sys

import ichprog_brain_commands as commands
import numpy as np
import pytest

import ichprog
from ichprog import registry, testing

TISSUE = """\
import nibabel as nib
import numpy as np
image = nib.load("scan.nii.gz")
hu = np.asarray(image.dataobj)
bone, mask = hu > 300, (hu > -20) & (hu < 140)
for axis in (0, 1):
    mask &= np.logical_or.accumulate(bone, axis)
    mask &= np.flip(np.logical_or.accumulate(np.flip(bone, axis), axis), axis)
mask = nib.Nifti1Image(mask.astype(np.uint8), image.affine)
"""
SYNTHSTRIP = (
    TISSUE + "assert sys.argv[1:] == ['-i', 'scan.nii.gz', '-m', 'mask.nii.gz']\nmask.to_filename(sys.argv[4])\n"
)
SPACING = (2.0, 2.0, 5.0)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put an executable with a Python program on the PATH, and nothing else."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def write(name, program):
        path = tmp_path / name
        header = (
            f"#!{sys.executable}\nimport sys\nfrom pathlib import Path\nimport nibabel as nib\nimport numpy as np\n"
        )
        path.write_text(header + program)
        path.chmod(0o755)

    return write


def head():
    hu = np.full((60, 70, 20), -1000, np.float32)
    hu[5:55, 5:65] = 1000
    hu[8:50, 8:62, 2:] = 35
    return hu


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry.brain_extractors, "_registered", {})
    ichprog.register_brain_extractor("synthstrip", commands.synthstrip)


def test_synthstrip_keeps_the_contract_of_an_extractor(install, registered):
    install("mri_synthstrip", SYNTHSTRIP)
    testing.check_brain_extractor("synthstrip", min_dice=0.7)


def test_totalsegmentator_writes_into_a_folder(install):
    program = "assert sys.argv[1:] == ['-i', 'scan.nii.gz', '-o', 'parts', '--roi_subset', 'brain']\n"
    install("TotalSegmentator", TISSUE + program + "Path('parts').mkdir()\nmask.to_filename('parts/brain.nii.gz')\n")
    mask = commands.totalsegmentator(head(), SPACING)
    assert mask.dtype == bool
    assert (mask == (head() == 35)).all()


def test_a_mask_in_another_voxel_order_is_reordered(install):
    install("synthstrip-docker", TISSUE + "nib.as_closest_canonical(mask).to_filename('mask.nii.gz')\n")
    assert (commands.synthstrip(head(), SPACING) == (head() == 35)).all()


def test_a_scan_is_predicted_with_the_mask_of_the_command(install, registered):
    install("mri_synthstrip", SYNTHSTRIP)
    image = ichprog.brain_mask((head(), np.diag([-2.0, -2.0, 5.0, 1.0])), brain="synthstrip")
    assert np.array_equal(np.asarray(image.dataobj), head() == 35)


@pytest.mark.parametrize(
    ("program", "expected_message"),
    [
        (None, "no command mri_synthstrip or synthstrip-docker is on the PATH. Install FreeSurfer"),
        ("sys.exit('no licence file')", "mri_synthstrip failed with exit code 1: no licence file"),
        ("", "mri_synthstrip wrote no mask.nii.gz"),
        ("Path('mask.nii.gz').write_text('text')", "the mask of mri_synthstrip cannot be read"),
        (TISSUE + "mask.slicer[:30].to_filename('mask.nii.gz')", "has shape (30, 70, 20), expected (60, 70, 20)"),
    ],
)
def test_a_failure_of_the_command_is_an_error_of_the_scan(install, program, expected_message):
    if program is not None:
        install("mri_synthstrip", program)
    with pytest.raises(ichprog.ScanError) as error:
        commands.synthstrip(head(), SPACING)
    assert expected_message in str(error.value)
    assert error.value.code == "extractor-failed"
