"""Study files: reading, refused files, and the templates."""

import dataclasses
import json
import tomllib
from importlib.resources import files

import jsonschema
import pytest

from ichprog import SpecError, UnknownNameError, zoo
from ichprog.spec import PluginRef
from ichprog.study import study_file
from ichprog.study.config import Baseline, Study
from ichprog.study.study_file import Simulated
from ichprog.train import PRESETS

from support import reference_pipeline

SMALL = """
name = "small"
cohort = ["a.csv", "more/b.csv"]
folds = 4
[[variant]]
name = "one"
model = "densenet121.prognosis"
[[variant]]
name = "all"
model = "compact.prognosis_gcs3_age"
"""


@pytest.fixture
def read(tmp_path):
    """Return a function that reads a study from text, with `new` before it and `more` after it."""

    def read_text(text=SMALL, *, new="", more=""):
        file = tmp_path / "study.toml"
        file.write_text(new + text + more)
        return Study.read(file)

    return read_text


# reading


@pytest.mark.parametrize("preset", ["default", "paper", "smoke"])
def test_every_template_is_a_commented_study(preset, read):
    text = study_file.template(preset)
    study = read(text)
    assert text.startswith("# ")
    assert preset in study_file.presets()
    assert study.task(study.stratify_by).name == study.variants[0].spec.tasks[0].name
    assert len({variant.name for variant in study.variants}) >= 3
    assert study.baselines[0] == Baseline("majority", "majority", (), None, study.stratify_by, False)


def test_the_paper_preset_has_seven_image_models_with_published_loss_weights(read):
    study = read(study_file.template("paper"))
    outcome = [variant for variant in study.variants if variant.spec.tasks[0].name == "prognosis"]
    image = [variant for variant in outcome if not variant.spec.clinical]
    assert len(image) == 7
    assert [variant.spec.fusion.name for variant in outcome if variant.spec.clinical] == ["film", "concat"]
    assert {variant.spec.name for variant in study.variants} == set(reference_pipeline.PUBLISHED)
    weights = {v.name: [task.loss_weight for task in v.spec.tasks] for v in image}
    assert weights["prognosis_age"] == [0.5, 0.3]
    assert weights["prognosis_gcs2"] == [0.4, 0.3]
    assert weights["prognosis_gcs3_age"] == [0.4, 0.3, 0.3]
    assert study.folds == 10
    assert all(variant.protocol == PRESETS["paper"] for variant in image)
    assert {baseline.kind for baseline in study.baselines} == {
        "majority", "logistic", "tree", "forest", "network", "fusion"
    }  # fmt: skip


def test_relative_paths_start_at_the_folder_of_the_file(read, tmp_path):
    spec = dataclasses.replace(zoo.find("densenet121.age"), name="own")
    (tmp_path / "own.json").write_text(json.dumps(spec.to_dict()))
    study = read(new='readers = "r.csv"\n', more='[[variant]]\nname = "own"\nmodel = "own.json"\n')
    assert study.cohort == (tmp_path / "a.csv", tmp_path / "more" / "b.csv")
    assert study.readers == tmp_path / "r.csv"
    assert study.variant("own").spec == spec


def test_the_brain_is_a_mode_an_extractor_or_a_mask(read, tmp_path):
    assert read(new='brain = "extract"\n').brain == "extract"
    assert read(new='brain = "morphology"\n').brain == "morphology"
    (tmp_path / "mask.nii.gz").touch()
    assert read(new='brain = "mask.nii.gz"\n').brain == tmp_path / "mask.nii.gz"


def test_a_variant_changes_its_model(read):
    study = read(
        more="""
tasks = ["gcs", "prognosis"]
loss_weights = { gcs = 0.25 }
backbone = { name = "densenet121", options = { dropout = 0.1 } }
head = { name = "softmax", options = {} }
shape = [8, 24, 24]
protocol = { loss_weighting = "uncertainty" }
saliency = ["grad_cam"]
"""
    )
    zoo_spec, (one, changed) = zoo.find("compact.prognosis_gcs3_age"), study.variants
    assert one.spec == zoo.find("densenet121.prognosis")
    assert [(task.name, task.loss_weight) for task in changed.spec.tasks] == [("gcs", 0.25), ("prognosis", 1.0)]
    assert all(task.head == PluginRef("softmax", {}) for task in changed.spec.tasks)
    assert changed.spec.backbone == PluginRef("densenet121", {"dropout": 0.1})
    assert changed.spec.input == dataclasses.replace(zoo_spec.input, shape=(8, 24, 24))
    assert changed.protocol == one.protocol.replace(loss_weighting="uncertainty")
    assert changed.saliency == ("grad_cam",)
    assert one.saliency == ()


def test_missing_keys_have_defaults(read):
    study = read()
    assert study.stratify_by == "prognosis"
    assert study.protocol == PRESETS["default"].replace(recalibrate=False)
    assert study.protocol.recalibrate is False
    assert (study.n_bootstrap, study.coverage, study.curve_sizes, study.readers, study.simulated) == (
        1000,
        0.9,
        (),
        None,
        None,
    )
    kinds = {baseline.name: baseline for baseline in study.baselines}
    assert {"majority", "age_gcs", "ich_score", "func_score"} == set(kinds)
    assert all(baseline.optional for baseline in kinds.values())
    assert read(new="baseline = []\n").baselines == ()


def test_a_learning_curve_covers_all_or_some_variants(read):
    assert read(more="[learning_curve]\nsizes = [40, 20]\n").curve_sizes == (20, 40)
    assert read(more="[learning_curve]\nsizes = [40]\n").curve_variants == ("one", "all")
    assert read(more='[learning_curve]\nsizes = [40]\nvariants = ["all"]\n').curve_variants == ("all",)


def test_patients_may_be_simulated(read):
    study = read(SMALL.replace('cohort = ["a.csv", "more/b.csv"]', "simulated = { patients = 9 }"))
    assert study.simulated == Simulated(9, 0)
    harder = "simulated = { patients = 9, shared_causes = 2.0, label_noise = 0.1, matrix = 112 }"
    study = read(SMALL.replace('cohort = ["a.csv", "more/b.csv"]', harder))
    assert study.simulated == Simulated(9, shared_causes=2.0, label_noise=0.1, matrix=112)
    assert study.cohort == ()


# refused files

VARIANT = '[[variant]]\nname = "new"\nmodel = "compact.prognosis_gcs3_age"\n'
BASELINE = '[[baseline]]\nname = "new"\n'


@pytest.mark.parametrize(
    ("new", "more", "message"),
    [
        ("fold = 3\n", "", r"study\.toml: Unknown key 'fold'\. Did you mean folds\?"),
        ("coverage = 1\n", "", r"Invalid coverage 1\.0\. Expected a number between 0 and 1"),
        ('coverage = "most"\n', "", "Invalid coverage 'most'. Expected a finite number"),
        ("simulated = { patients = 3 }\n", "", "either cohort.*or .simulated.*Give one of them"),
        ('brain = "yes"\n', "", r"study\.toml: brain: Unknown brain mode or extractor 'yes'"),
        ('brain = "morfology"\n', "", "brain: Unknown brain mode or extractor 'morfology'. Did you mean morphology"),
        ('brain = "none.nii.gz"\n', "", "brain: Invalid brain mask '.*none.nii.gz'. Expected an existing file"),
        ('stratify_by = "prognosi"\n', "", "stratify_by: Unknown task 'prognosi'. Did you mean prognosis"),
        ("[protocol]\nepoch = 3\n", "", "Unknown key of protocol 'epoch'. Did you mean epochs"),
        ("[protocol]\nepochs = 0\n", "", r"Invalid protocol\.epochs 0\. Expected a whole number from 1"),
        ('[protocol]\npreset = "papers"\n', "", r"protocol\.preset: Unknown preset 'papers'"),
        ("n_bootstrap = 0\n", "", "Invalid n_bootstrap 0. Expected 1 or more"),
        ("", '[[variant]]\nname = "x"\n', r"Missing key 'variant\[2\]\.model'\. Expected all of: name, model"),
        ("", VARIANT + "task = []\n", r"Unknown key of variant\[2\] 'task'\. Did you mean tasks"),
        ("", VARIANT + 'tasks = ["prognosys"]\n', r"variant\[2\]\.tasks: Unknown task 'prognosys'"),
        ("", VARIANT + "tasks = []\n", "Invalid tasks .* Expected one or more tasks"),
        ("", VARIANT + "loss_weights = { gsc = 1 }\n", r"loss_weights: Unknown task 'gsc'\. Did you mean gcs"),
        ("", VARIANT + "loss_weights = { gcs = 0 }\n", r"tasks\.gcs\.loss_weight 0\.0\. Expected a positive number"),
        ("", VARIANT + "shape = [8, 24]\n", r"Invalid variant\[2\]\.shape \[8, 24\]\. Expected a list of 3 entries"),
        ("", VARIANT + 'backbone = { name = "x" }\n', r"Missing key 'variant\[2\]\.backbone\.options'"),
        ("", VARIANT + "protocol = { split_seed = 4 }\n", r"protocol\.split_seed: defines the folds, which all"),
        ("", VARIANT + "protocol = { seed = -1 }\n", r"variant\[2\]\.protocol\.seed -1\. Expected a whole number of"),
        ("", VARIANT.replace("new", "one"), "Duplicate name 'one'"),
        ("", VARIANT.replace("new", "a/b"), "Invalid name 'a/b'. Expected letters, digits"),
        ("", VARIANT.replace("new", "all@20"), "Invalid name 'all@20'. Expected letters, digits"),
        ("", BASELINE + 'kind = "logistik"\n', r"Invalid baseline\[0\]\.kind 'logistik'"),
        ("", BASELINE + 'kind = "logistic"\n', r"baseline\[0\]: logistic takes at least one column and no variant"),
        ("", BASELINE + 'kind = "majority"\ncolumns = ["age"]\n', "majority takes no columns and no variant"),
        ("", BASELINE + 'kind = "fusion"\ncolumns = ["age"]\n', "fusion takes a variant and at least one column"),
        ("", BASELINE + 'kind = "fusion"\nvariant = "al"\ncolumns = ["age"]\n', r"variant: Unknown variant 'al'"),
        ("", BASELINE + 'kind = "majority"\ntask = "gcs"\n', "gcs has 3 labels. Expected a task with two labels"),
        ("", "[learning_curve]\nsizes = [20, 20]\n", r"Invalid learning_curve\.sizes \[20, 20\]\. Expected different"),
        ("", '[learning_curve]\nsizes = [20]\nvariants = ["on"]\n', "Unknown variant 'on'. Did you mean one"),
        ("name = 3 = 4\n", "", "cannot be read as TOML"),
    ],
)  # fmt: skip
def test_an_invalid_file_is_refused_with_the_allowed_values(new, more, message, read):
    tables = new.startswith("[")
    with pytest.raises(SpecError, match=message):
        read(new="" if tables else new, more=more + (new if tables else ""))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("label_noise = 1.5", r"simulated: Invalid label_noise 1\.5\. Expected a share from 0 to 1"),
        ("shared_causes = -1", r"simulated: Invalid shared_causes -1\.0\. Expected a number of at least 0"),
        ('preset = "plane"', r"simulated: Unknown preset 'plane'\. Did you mean plain"),
    ],
)
def test_an_impossible_simulation_is_refused(option, message, read):
    with pytest.raises(SpecError, match=message):
        read(SMALL.replace('cohort = ["a.csv", "more/b.csv"]', f"simulated = {{ patients = 9, {option} }}"))


def test_an_unknown_model_is_refused(read):
    with pytest.raises(UnknownNameError, match="Unknown model 'densenet12'"):
        read(more='[[variant]]\nname = "x"\nmodel = "densenet12"\n')


def test_a_missing_file_and_an_unknown_preset_are_refused(tmp_path):
    with pytest.raises(SpecError, match=r"none\.toml: cannot be read as TOML"):
        Study.read(tmp_path / "none.toml")
    with pytest.raises(UnknownNameError, match=r"Unknown study preset 'smok'\. Did you mean smoke"):
        study_file.template("smok")


def test_the_shipped_study_schema_is_current():
    """Otherwise run `ichprog spec --schema study > ichprog/schemas/study.schema.json`."""
    assert json.loads(files("ichprog").joinpath("schemas/study.schema.json").read_text()) == study_file.study_schema()


@pytest.mark.parametrize("preset", ["default", "paper", "smoke"])
def test_the_study_templates_are_valid_by_the_schema(preset):
    validator = jsonschema.Draft202012Validator(study_file.study_schema())
    validator.check_schema(study_file.study_schema())
    validator.validate(tomllib.loads(study_file.template(preset)))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(tomllib.loads(study_file.template(preset)) | {"fold": 3})


def test_a_variant_with_clinical_values_predicts_no_task_from_its_own_column(read):
    text = study_file.template("default").replace('fusion = { name = "film", options = {} }\n', "")
    variant = read(text).variants[-1]
    assert [(task.name, task.uses_clinical) for task in variant.spec.tasks] == [
        ("prognosis", True), ("gcs", False), ("age", False),
    ]  # fmt: skip
    assert variant.spec.fusion.name == "film"
    assert [value.unit for value in variant.spec.clinical] == ["years", "points"]
    with pytest.raises(SpecError, match=r"clinical: Unknown clinical value 'agee'. Did you mean age"):
        read(text.replace('clinical = ["age", "gcs"]', 'clinical = ["agee"]'))
    with pytest.raises(SpecError, match=r"fusion: needs `clinical`"):
        read(text.replace('clinical = ["age", "gcs"]', 'fusion = { name = "concat", options = {} }'))
