"""Nothing phones home: commands succeed without a network, and want no connection. `test_embedded` runs the demo so."""

import nibabel as nib
import numpy as np
import pytest

from support.no_network import namespace, run_without_network
from support.phantoms import brain_hu

pytestmark = pytest.mark.skipif(not namespace(), reason="needs a network namespace: `unshare -rn true` fails")


def test_a_download_fails_without_a_network_and_is_recorded(tmp_path):
    done, sockets = run_without_network(tmp_path, "fetch", "perez2023.prognosis")
    assert done.returncode == 1
    assert any("huggingface.co" in line for line in sockets)


@pytest.mark.parametrize("as_program", [True, False], ids=["program", "library"])
def test_a_prediction_wants_no_connection(as_program, tmp_path):
    nib.Nifti1Image(brain_hu((96, 96, 30)), np.diag([-2.5, -2.5, 5, 1])).to_filename(tmp_path / "scan.nii.gz")
    command = ("predict", "scan.nii.gz", "-m", "compact.prognosis_gcs3_age_v2", "--fold", "0", "-o", "r.csv")
    done, sockets = run_without_network(tmp_path, *command, as_program=as_program)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.csv").read_text().count("\n") == 2
    assert sockets == []
