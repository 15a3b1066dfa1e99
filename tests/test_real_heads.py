"""The figures on real heads: their arithmetic on synthetic heads, and a whole run on two real ones."""

import runpy
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "ct_ich"
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "real_heads.py"), run_name="real_heads")
DETECTOR = next(iter(BENCHMARK["DETECTORS"]))


@pytest.fixture
def heads():
    """Sixteen heads of ten slices; every second head shows one of two kinds of haemorrhage in two slices."""
    random = np.random.default_rng(0)
    made = []
    for number in range(16):
        slices = np.zeros((10, 5), bool)
        if number % 2:
            slices[3:5, number // 2 % 2] = True
        p = np.clip(random.uniform(0, 0.6, 10) + 0.4 * slices.any(1), 0, 1)
        scores = dict.fromkeys(BENCHMARK["DETECTORS"], BENCHMARK["Scores"](p, float(p.max())))
        made.append(BENCHMARK["Head"](
            f"h{number}", 5.0 + 6 * number, slices, 1500.0 + number, 0.5, ("no-blood",) * (number < 3),
            0.001, {"top": [(float(mm), 1.1 * mm) for mm in BENCHMARK["REMOVED_MM"]]}, scores,
            random.uniform(), random.uniform(),
        ))  # fmt: skip
    return made


def test_patients_and_slices_are_scored_as_by_scikit_learn(heads):
    row = BENCHMARK["detection_rows"](heads, DETECTOR)[0]
    by_patient = [(head.bleeds, head.scores[DETECTOR].patient) for head in heads]
    by_slice = [pair for h in heads for pair in zip(h.slices.any(1), h.scores[DETECTOR].slices, strict=True)]
    for level, pairs in (("patient", by_patient), ("slice", by_slice)):
        truth, scores = map(np.array, zip(*pairs, strict=True))
        auroc, sensitivity, specificity = (row[level][name] for name in BENCHMARK["METRICS"])
        assert auroc[0] == pytest.approx(roc_auc_score(truth, scores))
        assert sensitivity[0] == pytest.approx((scores[truth] > 0.5).mean())
        assert specificity[0] == pytest.approx((scores[~truth] <= 0.5).mean())
        assert auroc[1] <= auroc[0] <= auroc[2]


def test_other_kinds_are_left_out_of_the_figures_of_a_kind(heads):
    rows = {row["group"]: row for row in BENCHMARK["detection_rows"](heads, DETECTOR)}
    assert (rows["all"]["bleeding"], rows["all"]["other"]) == (8, 8)
    assert (rows["intraventricular"]["bleeding"], rows["intraventricular"]["other"]) == (4, 8)
    assert rows["18 years or older"]["bleeding"] + rows["18 years or older"]["other"] == 13


def test_a_threshold_is_applied_to_heads_that_did_not_choose_it(heads):
    figures = BENCHMARK["cross_fitted"](heads, DETECTOR)
    called = 0
    for fold in range(3):
        own, others = ([h for h in heads if (BENCHMARK["fold_of"](h.name) == fold) is own] for own in (True, False))
        truth = np.array([head.bleeds for head in others])
        scores = np.array([head.scores[DETECTOR].patient for head in others])
        levels = np.unique(scores)
        threshold = min(at for at in (levels[1:] + levels[:-1]) / 2 if (scores[~truth] < at).mean() >= 0.85)
        called += sum(h.scores[DETECTOR].patient > threshold for h in own if h.bleeds)
    assert figures["sensitivity"][0] == pytest.approx(called / figures["bleeding"])


def test_groups_of_few_patients_have_no_figures(heads):
    rows = {row["group"] for row in BENCHMARK["detection_rows"](heads[:12], DETECTOR)}
    assert not rows & {"intraventricular", "intraparenchymal", "epidural", "under 18 years"}


def test_the_page_has_the_figures_and_no_patient(heads):
    summary = BENCHMARK["summarise"](heads, [])
    assert summary["warnings"]["no-blood"] == [1, 2]
    assert summary["cropping"]["real, top"]["rows"][0]["median_error"] == pytest.approx(0.1)
    page = (ROOT / "docs" / "real-heads.md").read_text(encoding="utf-8")
    text = BENCHMARK["updated_page"](page, summary)
    assert text.startswith(page.partition("<!-- figures")[0])
    assert "16 heads, 8 with a haemorrhage, 160 slices, 16 with a haemorrhage." in text
    assert "| `no-blood` | 1 | 2 |\n" in text
    assert not any(head.name in text for head in heads)
    assert BENCHMARK["updated_page"](text, summary) == text


def test_slices_taken_off_an_ellipsoid_are_estimated():
    z = np.arange(-70, 71, 5.0)
    x, y = np.ogrid[-80:80:2, -90:90:2]
    brain = (x[..., None] / 70) ** 2 + (y[..., None] / 85) ** 2 + (z / 70) ** 2 <= 1
    for removed, estimated in BENCHMARK["take_slices_off"](brain, (2.0, 2.0, 5.0))[1:]:
        assert estimated == pytest.approx(removed, rel=0.3)


@pytest.mark.slow
def test_real_heads_are_measured(tmp_path, capsys):
    if not DATA.is_dir():
        pytest.skip("the real heads are absent")
    summary = BENCHMARK["main"]([str(DATA), "-o", str(tmp_path), "--patients", "49", "55", "--simulated", "1"])
    assert (summary["heads"], summary["bleeding"], summary["extraction"]["answered"]) == (2, 1, 2)
    assert len((tmp_path / "heads.csv").read_text().splitlines()) == 3
    assert "ct49" in capsys.readouterr().err
