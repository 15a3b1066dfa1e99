"""Variants that start from the backbone of another variant, on the same folds."""

import json

import pytest
from safetensors.numpy import load_file

from ichprog import SpecError
from ichprog.study import jobs

from support.small_study import job_names

PROTOCOL = """
name = "transfer"
cohort = ["cohort.csv"]
folds = 2
seeds = [1, 2]
brain = "given"
device = "cpu"
baseline = []
[protocol]
epochs = 2
warmup_epochs = 1
batch_size = 4
validation_fraction = 0.25
"""
AUXILIARY = '[[variant]]\nname = "auxiliary"\nmodel = "spec.json"\ntasks = ["gcs", "age"]\n'
FROZEN = (
    '[[variant]]\nname = "frozen"\nmodel = "spec.json"\ntasks = ["prognosis"]\nstart_from = "auxiliary"\n'
    "protocol = { freeze_backbone = true, learning_rates = [1e-3, 1e-2] }\n"
)


def test_a_frozen_variant_has_the_backbone_of_the_same_fold_and_seed(patients_folder, make_study, tmp_path):
    study = make_study('stratify_by = "prognosis"\n' + PROTOCOL, AUXILIARY + FROZEN)
    out = tmp_path / "out"
    statuses = jobs.run(study, out, cache_dir=patients_folder / "c")
    assert {status.state for status in statuses} == {"done"}, [status.error for status in statuses]
    for seed in ("", "@seed2"):
        for fold in (0, 1):
            before, after = (
                load_file(out / "runs" / f"{name}{seed}" / f"fold{fold}.safetensors")
                for name in ("auxiliary", "frozen")
            )
            keys = [key for key in before if key.startswith("backbone.")]
            assert keys
            assert all((before[key] == after[key]).all() for key in keys)
            result = json.loads((out / "runs" / f"frozen{seed}" / "folds" / str(fold) / "result.json").read_text())
            assert result["learning_rate"] in (1e-3, 1e-2)


def test_a_variant_waits_for_the_variant_that_it_starts_from(patients_folder, make_study, tmp_path, monkeypatch):
    from ichprog.train import trainer

    study = make_study('stratify_by = "prognosis"\n' + PROTOCOL.replace("seeds = [1, 2]\n", ""), AUXILIARY + FROZEN)
    train_fold = trainer.train_fold

    def fail_once(job, *rest):
        if job.spec.name == "auxiliary" and job.fold == 1 and not failed:
            failed.append(job.fold)
            raise MemoryError("no memory")
        return train_fold(job, *rest)

    failed = []
    monkeypatch.setattr(trainer, "train_fold", fail_once)
    first = jobs.run(study, tmp_path / "out", cache_dir=patients_folder / "c")
    assert job_names(first) == ["auxiliary-0"]
    assert "is not done in every fold. Run the study again" in next(
        status.error for status in first if status.job.name == "frozen-0"
    )
    again = jobs.run(study, tmp_path / "out", cache_dir=patients_folder / "c")
    assert {status.state for status in again} == {"done"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FROZEN + AUXILIARY, r"earlier variant"),
        (AUXILIARY + FROZEN.replace("start_from", "shape = [4, 16, 16]\nstart_from"), "another backbone or input"),
        (AUXILIARY + FROZEN.replace('start_from = "auxiliary"\n', ""), "freeze_backbone: needs start_from"),
        (AUXILIARY + FROZEN.replace('"auxiliary"\nprotocol', '"frozen"\nprotocol'), "earlier variant"),
    ],
    ids=["later", "other input", "nothing to start from", "itself"],
)
def test_wrong_starts_are_refused(make_study, text, message):
    with pytest.raises(SpecError, match=message):
        make_study('stratify_by = "prognosis"\n' + PROTOCOL, text)
