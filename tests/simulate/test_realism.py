"""Options of the simulation: plain patients stay as they were, and each option shows in the image what it says."""

import dataclasses
import hashlib

import nibabel as nib
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ichprog import Cohort, InvalidValueError, UnknownNameError
from ichprog.simulate import MASK_VALUES, PRESETS, Patient, Realism, simulate
from ichprog.simulate.anatomy import Individual
from ichprog.simulate.haemorrhage import draw_haemorrhage
from ichprog.simulate.population import SITES, draw_person
from ichprog.simulate.realism import find_realism
from ichprog.simulate.scanner import acquire

from support.cohorts import read_table

QUIET = Realism(noise_hu=(0.0, 0.0))  # without noise, the difference of two scans is the option
MARKS = {"atrophy": 0.0, "white_matter": 0.0, "calcification": 4.0}  # so that everything calcifies


def scan(realism=QUIET, *, seed=3, skull=False, **changes):
    """Acquire one head with options, all else equal."""
    person = dataclasses.replace(
        Patient(seed, 0, "plain").person,
        **{"site": "putamen", "side": 1, "volume_ml": 4.0, "ventricular": 0.0, "marks": MARKS, **changes},
    )
    random = np.random.default_rng(seed)
    individual = Individual(person.marks, random, realism.fill_mm)
    shape = draw_haemorrhage(person, individual, random, realism)
    return acquire(individual, shape, np.random.default_rng(seed), skull=skull, realism=realism)


@pytest.fixture(scope="module")
def plain():
    return scan()


def changed(plain, **options):
    """Return the change of HU by options, voxel by voxel."""
    other = scan(dataclasses.replace(QUIET, **options))
    return other.hu.astype(int) - plain.hu


def ml(mask, affine):
    return float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)


# Presets


@pytest.mark.parametrize(
    ("number", "skull", "fingerprint"),
    [
        (0, False, [52161976, 136021578, 24182]),
        (1, True, [-5815107835, -14821422313, 46753]),
        (3, False, [65526028, 172614945, 27045]),
    ],
)
def test_plain_patients_are_those_of_the_embedded_model(number, skull, fingerprint):
    """Sums over all voxels, measured before there were options; 200 HU among millions of voxels are rounding."""
    acquired = Patient(5, number, "plain").scan(skull=skull)
    hu = acquired.hu.astype(np.int64)
    sums = [
        int(hu.sum()),
        int((hu * np.arange(hu.shape[0])[:, None, None]).sum()) // 100,
        int((acquired.blood > 0).sum()),
    ]
    np.testing.assert_allclose(sums, fingerprint, atol=200)


def test_plain_people_are_those_of_the_embedded_model():
    people = [Patient(0, number, "plain") for number in range(300)]
    columns = [p.columns() for p in people]
    for each in columns:
        del each["haemorrhage"]  # is newer than the fingerprint
    rows = repr([(each, p.person.marks) for each, p in zip(columns, people, strict=True)])
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == "f5a78ac1088c7dd4"


def test_presets_are_found_by_name():
    assert find_realism("plain") == Realism()
    assert find_realism(QUIET) is QUIET
    assert PRESETS["realistic"].describe() == "realistic"
    assert QUIET.describe() == {"noise_hu": [0.0, 0.0]}
    with pytest.raises(UnknownNameError, match=r"Unknown preset 'real'. Did you mean realistic\?"):
        Patient(0, 0, "real")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"without_blood": 1.5}, "Invalid without_blood 1.5. Expected a share from 0 to 1"),
        ({"gyri_mm": -1.0}, "Invalid gyri_mm -1.0. Expected a number of at least 0"),
        ({"noise_hu": (3.0, 2.0)}, "Expected a range"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(InvalidValueError, match=message):
        Realism(**options)


# Cohorts


def test_a_realistic_cohort_states_its_preset_and_the_volume_of_each_kind(tmp_path):
    table = simulate(tmp_path, patients=3, seed=4, skull=True)
    [record] = Cohort.read(table).origin.records
    assert (record["preset"], record["seed"]) == ("realistic", 4)
    truths = read_table(tmp_path / "truth.csv")
    assert {truth["haemorrhage"] for truth in truths} == {"0", "1"}
    for patient, truth in zip(Cohort.read(table).patients, truths, strict=True):
        image = nib.load(tmp_path / f"masks/{patient.name}.nii.gz")
        mask = np.asarray(image.dataobj)
        for kind, value in MASK_VALUES.items():
            assert ml(mask == value, image.affine) == pytest.approx(float(truth[f"{kind}_ml"]), abs=1e-3)
        if truth["haemorrhage"] == "0":
            assert not mask.any()
            assert (patient.columns["poor_outcome"], patient.columns["gcs"], truth["kind"]) == ("", "", "none")
            continue
        kind = "subdural_epidural" if truth["kind"] in ("subdural", "epidural") else truth["kind"]
        assert float(truth[f"{kind}_ml"]) == pytest.approx(float(truth["volume_ml"]), rel=0.05, abs=0.1)
        assert set(np.unique(mask)) <= {0, 2, MASK_VALUES[kind]}
        assert int(truth["infratentorial"]) == (truth["location"] in ("cerebellum", "pons"))


def test_a_realistic_patient_is_the_same_each_time():
    first, second = (Patient(4, 1).scan() for _ in range(2))
    np.testing.assert_array_equal(first.hu, second.hu)
    np.testing.assert_array_equal(first.blood, second.blood)


def test_people_have_small_bleeds_of_all_kinds_at_any_age():
    people = [draw_person(np.random.default_rng([8, n]), PRESETS["realistic"]) for n in range(1500)]
    assert np.mean([not p.bleeds for p in people]) == pytest.approx(0.3, abs=0.04)
    assert min(p.age for p in people) == 18
    assert np.mean([p.age < 40 for p in people]) == pytest.approx(22 / 81, abs=0.04)
    bleeding = [p for p in people if p.bleeds]
    assert {p.site for p in bleeding} == set(SITES)
    volumes = [p.volume_ml for p in bleeding if p.kind == "parenchymal"]
    assert 5 < np.median(volumes) < 10  # the two public data sets: medians 6 and 10, 95th percentiles 46 and 52
    assert 40 < np.percentile(volumes, 95) < 60
    old = np.array([p.truth()["seen_age_80"] for p in people[:400]])
    assert np.mean([p.age >= 80 for p in people[:400]]) == pytest.approx(old.mean(), abs=0.05)
    assert not next(p for p in people if not p.bleeds).infratentorial


def draw_people(**options):
    realism = Realism(**options)
    return [draw_person(np.random.default_rng([9, number]), realism) for number in range(3000)]


@pytest.mark.slow
def test_labels_share_more_or_fewer_causes_with_the_image():
    areas = []
    for factor in (0.0, 1.0, 3.0):
        people = draw_people(shared_causes=factor)
        truths = [person.truth() for person in people]
        severe, old = [person.gcs <= 8 for person in people], [person.age >= 80 for person in people]
        areas.append(
            [
                roc_auc_score(severe, [truth["p_gcs_3_8"] for truth in truths]),
                roc_auc_score(old, [truth["seen_age_80"] for truth in truths]),
            ]
        )
        for name, happened in (("seen_poor", [p.poor for p in people]), ("seen_age_80", old)):
            stated = np.array([truth[name] for truth in truths])
            error = (stated * (1 - stated)).sum() ** 0.5
            assert abs(stated.sum() - sum(happened)) < 4 * error, (factor, name)
    without, as_published, strong = np.array(areas)
    assert np.abs(without - 0.5).max() < 0.03
    assert (as_published > without + 0.15).all()
    assert (strong > as_published + 0.05).all()


def test_some_outcomes_are_drawn_at_random():
    clean, noisy = draw_people(), draw_people(label_noise=0.4)
    changed = np.array([a.poor != b.poor for a, b in zip(clean, noisy, strict=True)])
    assert abs(changed.mean() - 0.2) < 4 * (0.2 * 0.8 / len(changed)) ** 0.5
    for first, second in zip(clean[:200], noisy[:200], strict=True):
        assert dataclasses.replace(second, poor=first.poor, label_noise=0.0) == first
        assert second.truth()["seen_poor"] == pytest.approx(0.6 * first.truth()["seen_poor"] + 0.2)
        assert second.truth()["p_gcs_3_8"] == first.truth()["p_gcs_3_8"]


@pytest.mark.parametrize(("site", "value"), [("epidural", 4), ("convexity", 3), ("subdural", 4), ("lobar", 1)])
def test_masks_name_the_kind(site, value):
    realism = dataclasses.replace(QUIET, exact_masks=True, all_kinds=True)
    acquired = scan(realism, site=site, volume_ml=12.0, ventricular=0.3)
    assert set(np.unique(acquired.blood)) == {0, 2, value}
    assert ml(acquired.blood == value, acquired.affine) == pytest.approx(12.0, rel=0.05)
    assert 40 < np.median(acquired.hu[acquired.blood == value]) < 75


# Images


def test_venous_sinuses_have_the_stated_density(plain):
    low, high = (scan(dataclasses.replace(QUIET, sinus_hu=(hu, hu))).hu.astype(int) for hu in (45.0, 65.0))
    change = high - low
    assert 17 <= np.percentile(change[change > 0], 99) <= 20  # a voxel full of venous blood
    assert change.min() >= 0
    assert 3 < ml(change > 10, plain.affine) < 30
    behind = np.nonzero(change > 10)[1].mean()  # j runs to posterior
    assert behind > np.argwhere(plain.inside)[:, 1].mean() + 20


def test_beam_hardening_brightens_what_lies_under_bone(plain):
    from scipy import ndimage

    change = changed(plain, hardening_hu=20.0)
    spacing = np.linalg.norm(plain.affine[:3, :3], axis=0)
    depth = ndimage.distance_transform_edt(plain.inside, spacing)
    shallow, deep = change[(depth > 0) & (depth < 5)].mean(), change[depth > 30].mean()
    assert 2 < shallow < 20
    assert deep < shallow / 4
    assert change.max() < 60


@pytest.mark.parametrize("option", ["dura", "calcification", "arteries"])
def test_dense_structures_are_added(plain, option):
    change = changed(plain, **{option: True})
    assert 0.05 < ml(change > 5, plain.affine) < 250
    assert np.median(change[plain.inside]) == 0


def test_gyri_differ_and_the_skull_does_not(plain):
    other = scan(dataclasses.replace(QUIET, gyri_mm=3.0))
    np.testing.assert_array_equal(other.inside, plain.inside)
    assert np.abs(other.hu.astype(int) - plain.hu)[plain.inside].mean() > 2
    assert other.hu[plain.inside].mean() == pytest.approx(plain.hu[plain.inside].mean(), abs=1.0)


def test_quantised_scans_have_the_steps_of_two_windows():
    hu = scan(Realism(windowed=1.0), skull=True).hu
    assert hu.max() <= 2300
    bone = np.unique(hu[hu > 120])
    assert np.diff(bone).min() >= 12
    assert -1000 in hu


def test_slices_may_be_thick_and_the_head_turned():
    heads = [scan(dataclasses.replace(QUIET, thick_slices=True, tilt_deg=25.0), seed=seed) for seed in range(3, 6)]
    spacings = {float(head.affine[2, 2]) for head in heads}
    assert spacings <= {2.5, 3.0, 4.0, 5.0, 6.0, 7.5}
    assert len(spacings) > 1
    lengths = [np.ptp(np.nonzero(head.inside)[1]) for head in heads]
    assert min(lengths) > 200


def test_kernels_change_edges_and_keep_the_mean(plain):
    change = changed(plain, kernels=True)
    assert np.abs(change[plain.inside]).max() > 3
    assert abs(change[plain.inside].mean()) < 1
