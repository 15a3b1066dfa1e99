"""Simulated patients: the same for a seed, drawn as they say, and with an outcome that follows the stated model."""

import dataclasses
import subprocess
import sys
import time

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from ichprog import Cohort, IchprogError, InvalidValueError, RunError, zoo
from ichprog.cli import main
from ichprog.preprocessing import prepare
from ichprog.scan import load, read
from ichprog.simulate import MASK_VALUES, Patient, Realism, anatomy, simulate
from ichprog.simulate.anatomy import Individual
from ichprog.simulate.haemorrhage import draw_haemorrhage
from ichprog.simulate.population import draw_person
from ichprog.simulate.scanner import acquire

from support.cohorts import read_table
from support.models import SHARED

PLAUSIBLE = zoo.find(zoo.DEFAULT).input.expected_ranges


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Four patients."""
    folder = tmp_path_factory.mktemp("cohort")
    simulate(folder, patients=4, seed=5, preset="plain")
    return folder


@pytest.fixture(scope="module")
def people():
    return [draw_person(np.random.default_rng([9, number])) for number in range(4000)]


@pytest.fixture(scope="module")
def truths(people):
    return [person.truth() for person in people]


def drawn(seed=0, **changes):
    """One patient's scan, with changes to who they are and all chance the same."""
    patient = Patient(seed, 0, "plain")
    person = dataclasses.replace(patient.person, **changes)
    random = np.random.default_rng(seed)
    individual = Individual(person.marks, random)
    shape = draw_haemorrhage(person, individual, random)
    return acquire(individual, shape, np.random.default_rng(seed)), shape


def ml(mask, affine):
    return float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)


# Cohorts


def test_a_cohort_is_the_same_for_any_number_of_workers_and_may_grow(cohort, tmp_path):
    simulate(tmp_path, patients=2, seed=5, preset="plain")
    simulate(tmp_path, patients=4, seed=5, preset="plain", workers=2)
    assert contents(tmp_path) == contents(cohort)


def noise_sd(matrix, contract):
    """The standard deviation of the noise on the grid of a model, for 4 HU in each pixel of a full scan."""
    loud, silent = (
        prepare(Patient(3, 1, Realism(noise_hu=(hu, hu))).scan(matrix=matrix).hu, contract) for hu in (4.0, 0.0)
    )
    within = silent > 0.05
    return 100 * float((loud - silent)[within].std())


def test_a_scan_with_fewer_pixels_shows_the_same_patient_on_the_grid():
    contract = zoo.find("compact.prognosis_gcs3_age").input
    patient = Patient(3, 1, "plain")
    full, small = patient.scan(), patient.scan(matrix=112)
    assert small.hu.shape == (112, 112, full.hu.shape[2])
    grids = [prepare(scan.hu, contract) for scan in (full, small)]
    within = np.logical_and(*[grid > 0.05 for grid in grids])
    assert within.mean() > 0.95 * (grids[0] > 0.05).mean()
    assert np.corrcoef(*[grid[within] for grid in grids])[0, 1] > 0.93
    assert abs(np.subtract(*grids)[within].mean()) < 0.005
    volumes = [ml(scan.blood == 1, scan.affine) for scan in (full, small)]
    assert volumes[1] == pytest.approx(volumes[0], rel=0.1)
    assert noise_sd(112, contract) == pytest.approx(noise_sd(512, contract), rel=0.35)


def test_scans_have_the_pixels_of_a_model_grid_on_request(tmp_path):
    folder, arguments = tmp_path / "small", ["--patients", "2", "--seed", "5", "--grid"]
    result = CliRunner().invoke(main, ["simulate", str(folder), *arguments, "compact.prognosis_gcs3_age"])
    assert result.exit_code == 0, result.output
    cohort = Cohort.read(folder / "cohort.csv")
    assert {read(patient.scan).hu.shape[:2] for patient in cohort.patients} == {(112, 112)}
    assert cohort.origin.kind == "simulated"
    with pytest.raises(RunError, match=r"holds simulated patients of .*'matrix': 112"):
        simulate(folder, patients=2, seed=5)
    result = CliRunner().invoke(main, ["simulate", str(folder), *arguments, "compact.prognosis"])
    assert result.exit_code == 2
    assert "compact.prognosis_gcs3_age" in result.output
    with pytest.raises(InvalidValueError, match="matrix 8"):
        simulate(tmp_path / "none", patients=2, matrix=8)


def test_an_interrupted_simulation_is_resumed(cohort, tmp_path):
    def stop(done):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(tmp_path, patients=4, seed=5, preset="plain", progress=stop)
    assert not (tmp_path / "cohort.csv").exists()
    assert len(list((tmp_path / "scans").iterdir())) == 2
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "scans").iterdir()}
    seen = []
    simulate(tmp_path, patients=4, seed=5, preset="plain", progress=seen.append)
    assert seen == [3, 4]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert contents(tmp_path) == contents(cohort)


def test_a_killed_simulation_leaves_no_partial_files(cohort, tmp_path):
    options = ["--patients", "4", "--seed", "5", "--preset", "plain"]
    command = [sys.executable, "-m", "ichprog", "simulate", str(tmp_path), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        while not list(tmp_path.glob("masks/*.nii.gz")):
            assert running.poll() is None
            time.sleep(0.01)
        with pytest.raises(RunError, match="another process"):
            simulate(tmp_path, patients=4, seed=5, preset="plain")
        running.kill()
    simulate(tmp_path, patients=4, seed=5, preset="plain")
    assert contents(tmp_path) == contents(cohort)


def test_a_folder_holds_one_cohort(cohort, tmp_path):
    with pytest.raises(RunError, match=r"'seed': 5.*'seed': 6"):
        simulate(cohort, patients=4, seed=6, preset="plain")
    with pytest.raises(RunError, match="skull"):
        simulate(cohort, patients=4, seed=5, preset="plain", skull=True)
    (tmp_path / "cohort.csv").write_text("patient,scan\n")
    with pytest.raises(RunError, match="not simulated here"):
        simulate(tmp_path, patients=1)
    with pytest.raises(InvalidValueError, match="Invalid patients 0"):
        simulate(tmp_path / "new", patients=0)


def test_the_table_is_a_cohort_with_true_probabilities(cohort):
    read_back = Cohort.read(cohort / "cohort.csv")
    assert len(read_back) == 4
    spec = zoo.find(zoo.DEFAULT)
    assert set(read_back.labels(spec.task("gcs"))) <= {0, 1, 2}
    for row in read_table(cohort / "truth.csv"):
        assert float(row["p_gcs_13_15"]) + float(row["p_gcs_9_12"]) + float(row["p_gcs_3_8"]) == pytest.approx(
            1, abs=1e-4
        )
        assert 0 <= float(row["seen_poor"]) <= 1


def test_a_missing_template_names_the_extra(tmp_path, monkeypatch):
    anatomy.template.cache_clear()
    monkeypatch.setitem(sys.modules, "nilearn", None)
    with pytest.raises(IchprogError, match=r"needs nilearn. Install it with: pip install 'ichprog\[simulate\]'\."):
        simulate(tmp_path, patients=1)


def test_the_template_is_that_of_nilearn():
    from nilearn import datasets

    image = datasets.load_mni152_gm_template(resolution=1)
    assert np.array_equal(anatomy.template().grey, image.get_fdata(dtype=np.float32))
    assert np.array_equal(anatomy.template().fine, image.affine[:3, 3])


def test_the_command_simulates(tmp_path):
    result = CliRunner().invoke(main, ["simulate", str(tmp_path / "c"), "--patients", "1", "--seed", "5"])
    assert result.exit_code == 0, result.output
    assert "simulated" in result.stderr
    assert result.stdout.strip() == str(tmp_path / "c" / "cohort.csv")
    result = CliRunner().invoke(main, ["simulate", str(tmp_path / "c"), "--seed", "7"])
    assert (result.exit_code, "Choose another folder" in result.output) == (1, True)


# Scans


def test_scans_look_like_those_of_a_scanner(cohort):
    for row in read_table(cohort / "cohort.csv"):
        image = nib.load(cohort / row["scan"])
        assert image.shape[:2] == (512, 512)
        assert 24 <= image.shape[2] <= 54
        assert image.get_data_dtype() == np.int16
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        assert 0.4 < image.header.get_zooms()[0] < 0.5
        assert 2.5 <= image.header.get_zooms()[2] <= 5
        assert "simulated" in str(image.header["descrip"])
        examined = load(cohort / row["scan"], expected_ranges=PLAUSIBLE)
        assert {warning.code for warning in examined.warnings} <= {"no-blood"}


def test_the_mask_is_the_haemorrhage(cohort):
    for row, truth in zip(read_table(cohort / "cohort.csv"), read_table(cohort / "truth.csv"), strict=True):
        image = nib.load(cohort / row["scan"])
        hu, mask = np.asarray(image.dataobj), np.asarray(nib.load(cohort / f"masks/{row['patient']}.nii.gz").dataobj)
        volume = float(truth["volume_ml"])
        value = MASK_VALUES[{"subdural": "subdural_epidural"}.get(truth["kind"], truth["kind"])]
        assert ml(mask == value, image.affine) == pytest.approx(volume, rel=0.12, abs=0.5), row["location"]
        assert (ml(mask == 2, image.affine) > 0) == (float(truth["ventricular"]) > 0)
        assert 45 < np.median(hu[mask == value]) < 85
        assert np.median(hu[(mask == 0) & (hu != 0)]) < 40
        if row["location"] in ("putamen", "lobar", "subdural", "cerebellum"):
            where = nib.affines.apply_affine(image.affine, np.argwhere(mask == value)).mean(0)
            head = nib.affines.apply_affine(image.affine, np.argwhere(hu != 0)).mean(0)
            assert np.sign(head[0] - where[0]) == int(truth["side"])  # RAS: the left side is negative


def test_tissues_have_plausible_hu():
    exposure, _ = drawn(site="putamen", volume_ml=3.0, ventricular=0.0, marks=dict.fromkeys(anatomy_marks(), 0.0))
    inside = exposure.hu[exposure.inside & (exposure.blood == 0)]
    assert 28 < np.median(inside) < 38
    assert np.percentile(inside, 3) < 15
    assert exposure.hu[~exposure.inside].max() == 0


def anatomy_marks():
    return Patient(0, 0, "plain").person.marks


def test_mass_effect_follows_the_volume():
    shifts, fluid = [], []
    for volume in (4.0, 30.0, 90.0):
        exposure, shape = drawn(site="putamen", side=1, volume_ml=volume, ventricular=0.0)
        shifts.append(shape.midline_shift_mm())
        i, j, k = np.ogrid[tuple(slice(n) for n in exposure.hu.shape)]
        middle = np.argwhere(exposure.inside).mean(0)
        deep = (np.abs(i - middle[0]) < 80) & (np.abs(j - middle[1]) < 110) & (np.abs(k - middle[2]) < 5)
        fluid.append(int((deep & (i > middle[0]) & exposure.inside & (exposure.hu < 16)).sum()))
    assert shifts[0] < 1.5
    assert shifts == sorted(shifts)
    assert 4 < shifts[2] < 15
    assert fluid[2] < 0.7 * fluid[0]


def test_the_image_shows_the_marks_of_age():
    shares = []
    for atrophy in (-2.0, 0.0, 2.0):
        exposure, _ = drawn(site="lobar", volume_ml=5.0, marks={**anatomy_marks(), "atrophy": atrophy})
        shares.append((exposure.inside & (exposure.hu < 18)).sum() / exposure.inside.sum())
    assert shares == sorted(shares)
    assert shares[2] > 1.5 * shares[0]
    dense = []
    for calcification in (-2.0, 2.0):
        exposure, _ = drawn(site="lobar", volume_ml=5.0, marks={**anatomy_marks(), "calcification": calcification})
        dense.append(int((exposure.hu > 120).sum()))
    assert dense[0] < 5 < dense[1]


def test_the_brain_is_extracted_from_whole_heads_in_dicom(tmp_path):
    simulate(tmp_path, patients=2, seed=5, preset="plain", skull=True, dicom=True)
    for number, row in enumerate(read_table(tmp_path / "cohort.csv")):
        exposure = Patient(5, number, "plain").scan(skull=True)
        scan = read(tmp_path / row["scan"])
        np.testing.assert_array_equal(scan.hu, exposure.hu)
        np.testing.assert_allclose(scan.affine, exposure.affine, atol=1e-4)
        examined = load(scan, expected_ranges=PLAUSIBLE)
        assert examined.record["brain"] == "extracted"
        overlap = 2 * (examined.brain & exposure.inside).sum() / (examined.brain.sum() + exposure.inside.sum())
        assert overlap > 0.95
        assert examined.brain[(exposure.blood > 0) & (exposure.blood != MASK_VALUES["ventricular"])].mean() > 0.98


@pytest.mark.skipif(not SHARED.exists(), reason="needs the average brain")
def test_a_brain_has_the_tissues_of_a_real_one():
    """The average brain is smooth, without sulci, and of no old age: its middle lies in the denser half of these."""
    real = read(SHARED / "brain_ct_average_1mm.nii.gz")
    inside = real.hu[(real.hu > 0) & (real.hu < 60)]
    for number in range(3):
        exposure = Patient(5, number, "plain").scan()
        simulated = exposure.hu[exposure.inside & (exposure.blood == 0)]
        assert abs(np.percentile(simulated, 75) - np.median(inside)) < 5


# Population


def test_correlations_are_near_those_of_the_real_cohort(people):
    """REFERENCE: Spearman with the outcome: GCS -0.34, age 0.39, GCS of 8 or less 0.25."""
    poor = [p.poor for p in people]
    gcs, age = np.array([p.gcs for p in people]), [p.age for p in people]
    assert stats.spearmanr(gcs, poor).statistic == pytest.approx(-0.34, abs=0.08)
    assert stats.spearmanr(age, poor).statistic == pytest.approx(0.39, abs=0.05)
    assert stats.spearmanr(gcs <= 8, poor).statistic == pytest.approx(0.25, abs=0.05)
    assert 0.5 < np.mean(poor) < 0.65


def test_scores_equal_the_published_tables(people):
    """Against the tables of the two papers, written again in the plainest way."""
    for p in people[:500]:
        ich = {True: 2, False: 0}[p.gcs in (3, 4)] + {True: 1, False: 0}[5 <= p.gcs <= 12]
        ich += (p.volume_ml >= 30) + (p.ventricular > 0) + (p.site in ("cerebellum", "pons")) + (p.age >= 80)
        assert p.ich_score() == ich
        func = 4 if p.volume_ml < 30 else 2 if p.volume_ml <= 60 else 0
        func += 2 if p.age < 70 else 1 if p.age <= 79 else 0
        func += {"cerebellum": 0, "pons": 0, "putamen": 1, "thalamus": 1}.get(p.site, 2)
        func += (2 if p.gcs >= 9 else 0) + (0 if p.impaired else 1)
        assert p.func_score() == func


def test_deaths_follow_the_ich_score(people):
    published = {0: 0.0, 1: 0.13, 2: 0.26, 3: 0.72, 4: 0.97, 5: 1.0}
    for score, rate in published.items():
        dead = [p.dead for p in people if p.ich_score() == score]
        error = np.sqrt(max(rate * (1 - rate), 1e-4) / max(1, len(dead)))
        assert not dead or abs(np.mean(dead) - rate) < 4 * error + 1e-9


@pytest.mark.parametrize(
    ("probability", "happened"),
    [
        ("p_poor", lambda p: p.poor),
        ("seen_poor", lambda p: p.poor),
        ("seen_poor_with_age_gcs", lambda p: p.poor),
        ("seen_age_80", lambda p: p.age >= 80),
        ("p_gcs_13_15", lambda p: p.gcs >= 13),
        ("p_gcs_9_12", lambda p: 9 <= p.gcs <= 12),
        ("p_gcs_3_8", lambda p: p.gcs <= 8),
    ],
)
def test_events_occur_as_often_as_their_probabilities(people, truths, probability, happened):
    probabilities = np.array([truth[probability] for truth in truths])
    events = np.array([happened(p) for p in people])
    for part in np.array_split(np.argsort(probabilities), 5):
        error = np.sqrt(max(probabilities[part].mean() * (1 - probabilities[part].mean()), 1e-4) / len(part))
        assert abs(events[part].mean() - probabilities[part].mean()) < 4.5 * error + 0.01  # ages are whole years


def test_the_image_does_not_show_the_whole_cause(people, truths):
    from sklearn.metrics import roc_auc_score

    poor = [p.poor for p in people]
    known, seen = ([truth[name] for truth in truths] for name in ("p_poor", "seen_poor"))
    assert 0.7 < roc_auc_score(poor, seen) < roc_auc_score(poor, known) - 0.03 < 0.95


def test_maps_at_the_same_points_are_interpolated_as_one_by_one():
    form = anatomy.template()
    points = np.random.default_rng(0).uniform(-200, 200, (3, 40, 50)).astype(np.float32)  # also outside of the maps
    one_by_one = [form.at(each, points) for each in (form.depth, form.ventricle, *form.outward, *form.upward)]
    assert np.allclose(form.coarse_at(points), one_by_one, atol=1e-5)
