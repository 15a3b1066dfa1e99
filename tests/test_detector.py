"""The embedded network for haemorrhage finds, measures and places simulated blood."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest

import ichprog
from ichprog import zoo
from ichprog.simulate import Patient
from ichprog.simulate.anatomy import Individual
from ichprog.simulate.haemorrhage import draw_haemorrhage
from ichprog.simulate.scanner import acquire


@pytest.fixture(scope="module")
def model():
    return ichprog.load_model(zoo.DETECTOR, offline=True)


def acquired(*, skull=False, **changes):
    """Return a simulated scan and its mask with changes to the patient and a fixed random seed."""
    patient = Patient(11, 4, "realistic")
    person = dataclasses.replace(patient.person, **changes)
    random = np.random.default_rng(3)
    individual = Individual(person.marks, random, patient.realism.fill_mm)
    shape = draw_haemorrhage(person, individual, random, patient.realism)
    scan = acquire(individual, shape, np.random.default_rng(3), skull=skull, realism=patient.realism)
    return nib.Nifti1Image(scan.hu, scan.affine), nib.Nifti1Image(scan.blood, scan.affine)


def test_the_embedded_network_is_small_verified_and_names_its_data(model):
    assert sum(file.path.stat().st_size for file in model.weights) <= 4_000_000
    assert {file.path.name: file.sha256 for file in model.weights} == dict(model.spec.weights.sha256)
    assert model.check_golden_output()["state"] == "holds"
    assert "ct-ich" in model.spec.licence.data
    assert "CC BY 4.0" in model.spec.licence.data
    assert "only presence was checked" in model.spec.limits[0]


@pytest.mark.parametrize(("side", "name"), [(1, "left"), (-1, "right")])
def test_blood_is_found_measured_and_placed(model, side, name):
    scan, mask = acquired(site="lobar", side=side, volume_ml=30.0, ventricular=0.0)
    found = ichprog.haemorrhage(scan, model=model)
    answer, truth = np.asarray(found.mask.dataobj) > 0, np.asarray(mask.dataobj) > 0
    assert 2 * (answer & truth).sum() / (answer.sum() + truth.sum()) > 0.7
    assert found.is_present
    assert (found.side, found.location) == (name, "lobar")
    assert found.infratentorial < 0.1
    voxel_ml = abs(np.linalg.det(mask.affine[:3, :3])) / 1000
    low, high = found.intervals_ml["total"]
    assert low < truth.sum() * voxel_ml < high
    slices = np.array(found.slice_probabilities)
    assert slices[truth.any((0, 1))].mean() > slices[~truth.any((0, 1))].mean() + 0.3


def test_no_blood_is_found_where_there_is_none(model):
    scan, _ = acquired(site="none", side=0, volume_ml=0.0, ventricular=0.0)
    found = ichprog.haemorrhage(scan, model=model)
    assert not found.is_present
    assert found.volume_ml["total"] < 1.0
