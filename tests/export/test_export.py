"""Exported files agree with the library, and models are published on the Hub with the real client."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from torch import nn

import ichprog
from ichprog import export, networks, registry, zoo
from ichprog.cli import main
from ichprog.cohort import Origin
from ichprog.errors import IchprogError, PluginError, SpecError, UnknownNameError, WeightsError
from ichprog.spec import ModelSpec, PluginRef
from ichprog.train import TrainOptions, train
from ichprog.train.description import describe_training

from support import reference_pipeline
from support.cohorts import QUICK, SHAPE, read_table, write_cohort
from support.hub_server import HubServer

REPO = "org/bright"
# The Hub's client uploads to LFS in a way that its own HTTP client gives up.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload:DeprecationWarning")


def mean_probabilities(model, grids):
    """Return the label probabilities of each task by the library, averaged over folds."""
    answers = model.predict_grids(grids)
    return {task: np.mean([fold[task].probabilities for fold in answers], axis=0) for task in answers[0]}


def read_by_openvino(path, grids):
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert compiled.inputs[0].get_any_name() == "grid"
    found = compiled(grids[:, None])
    return {output.get_any_name(): found[output] for output in compiled.outputs}


def read_by_reference(path, grids):
    from onnx.reference import ReferenceEvaluator

    session = ReferenceEvaluator(str(path))
    return dict(zip(session.output_names, session.run(None, {"grid": grids[:, None]}), strict=True))


def agree(found, expected, tolerance=1e-5):
    assert list(found) == list(expected)
    for task, values in expected.items():
        assert np.abs(found[task] - values).max() < tolerance
        assert np.ptp(values) > 0.01


@pytest.fixture
def two_fold_model(bright_model):
    """Return the bright model with folds that differ, one of them with crossing ordinal logits."""
    folder = Path(bright_model.removeprefix("local-dir:"))
    for fold in (0, 1):
        state = load_file(folder / f"fold{fold}.safetensors")
        for key in state:
            if key.endswith("linear.weight"):
                state[key] = torch.linspace(2, 9, len(state[key]))[:, None] * (fold + 1)
        if fold == 1:
            state["heads.gcs.linear.bias"] = torch.tensor([-1.0, 2.0])
        save_file(state, folder / f"fold{fold}.safetensors")
    return bright_model


# --- export


def test_an_exported_file_and_the_library_agree_for_any_batch_size(two_fold_model, tmp_path):
    model = ichprog.load_model(two_fold_model)
    path = export.export(model, tmp_path / "out" / "onnx")
    other = export.export(two_fold_model, tmp_path / "out" / "ir", format="openvino")
    assert sorted(p.name for p in path.parent.iterdir()) == ["config.json", "model.onnx"]
    assert sorted(p.name for p in other.parent.iterdir()) == ["config.json", "model.bin", "model.xml"]
    assert sorted(p.name for p in path.parent.parent.iterdir()) == ["ir", "onnx"]
    assert ModelSpec.read(path.parent / "config.json") == model.spec
    for batch in (1, 3):
        grids = np.random.default_rng(batch).random((batch, *model.spec.input.shape), np.float32)
        expected = mean_probabilities(model, grids)
        assert (model.predict_grids(grids)[1]["gcs"].probabilities[:, 1] == 0).all()
        for found in (read_by_openvino(path, grids), read_by_openvino(other, grids), read_by_reference(path, grids)):
            agree(found, expected)


@pytest.mark.parametrize(
    "name", ["perez2023.prognosis", pytest.param("densenet121.prognosis_gcs3_age", marks=pytest.mark.slow)]
)
def test_published_networks_can_be_exported(name, tmp_path):
    folder = reference_pipeline.save(name, tmp_path, seed=0).parent
    spec = zoo.find(name)
    weights = dataclasses.replace(spec.weights, repo=None, revision=None, folder="")
    contract = dataclasses.replace(spec.input, shape=(40, 64, 64), pad_slices=False)
    (folder / "config.json").write_text(
        json.dumps(dataclasses.replace(spec, weights=weights, input=contract).to_dict())
    )
    model = ichprog.load_model(f"local-dir:{folder}")
    grids = np.random.default_rng(0).random((3, 40, 64, 64), np.float32)
    expected = mean_probabilities(model, grids)
    found = read_by_openvino(export.export(model, tmp_path / "out"), grids)
    for task, values in expected.items():
        assert np.abs(found[task] - values).max() < 1e-5


def test_the_file_says_what_it_is_and_not_where_it_was_made(bright_model, tmp_path):
    import onnx

    model = ichprog.load_model(bright_model, fold=1)
    path = export.export(model, tmp_path / "out")
    loaded = onnx.load(path)
    onnx.checker.check_model(loaded, full_check=True)
    assert {entry.key: entry.value for entry in loaded.metadata_props} == {
        "ichprog.model": model.spec.name,
        "ichprog.notice": model.spec.notice,
        "ichprog.fold1.sha256": model.weights[0].sha256,
    }
    assert loaded.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    content = path.read_bytes()
    for place in (str(tmp_path), str(Path(ichprog.__file__).parent), "site-packages", str(Path.home())):
        assert place.encode() not in content


class Peculiar(nn.Module):
    """A head that computes with something ONNX has not, or for one size of batch."""

    def __init__(self, in_channels, labels, *, how):
        super().__init__()
        self.how, self.linear = how, nn.Linear(in_channels, len(labels))

    def forward(self, features):
        return self.linear(features.mean((2, 3, 4)))

    def probabilities(self, logits):
        if self.how == "operator":
            return logits.cummin(1).values.softmax(1)
        if self.how == "branch":
            return logits.softmax(1) if logits.sum() > 0 else logits.sigmoid()
        return logits.softmax(1) + torch.zeros(len(logits), 1)

    def loss(self, logits, target):
        return nn.functional.cross_entropy(logits, target)


@pytest.mark.parametrize("how", ["operator", "branch", "batch"])
def test_a_head_that_cannot_be_exported_is_named(how, bright_model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(registry.heads, "_registered", {})
    ichprog.register_head("peculiar", Peculiar)
    first, second, third = (spec := ichprog.load_model(bright_model, fold=0).spec).tasks
    tasks = (first, dataclasses.replace(second, head=PluginRef("peculiar", {"how": how})), third)
    spec = dataclasses.replace(spec, tasks=tasks)
    save_file(networks.build(spec).state_dict(), tmp_path / "fold0.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(spec.to_dict()))
    with pytest.raises(PluginError, match="head 'peculiar' of 'gcs' cannot be exported"):
        export.export(f"local-dir:{tmp_path}", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".export-*"))
    assert tuple(capfd.readouterr()) == ("", "")


def test_a_missing_package_or_unknown_format_is_refused(bright_model, tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match=r"'tflite'.*onnx, openvino"):
        export.export(bright_model, tmp_path / "out", format="tflite")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(IchprogError, match=r"needs onnxscript. Install it with: pip install 'ichprog\[export\]'"):
        export.export(bright_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the model card


def test_the_card_contains_the_facts_of_the_spec(bright_model):
    spec = ichprog.load_model(bright_model).spec
    text = export.build_card(spec, REPO)
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert {"license: other", "library_name: ichprog"} <= set(front.splitlines())
    assert {"- ichprog", "- medical", "- intracranial-haemorrhage"} <= set(front.splitlines())
    assert body.index(spec.notice) < body.index(spec.summary)
    for said in ("`9-12` below 13, `3-8` below 9", spec.licence.data, spec.citation.doi, *spec.limits):
        assert said in body
    assert "## Training" not in body
    free = dataclasses.replace(spec, licence=dataclasses.replace(spec.licence, weights="Apache-2.0"))
    assert "\nlicense: apache-2.0\n" in export.build_card(free, REPO)


def test_no_text_of_a_description_is_html_in_the_card():
    spec = ichprog.zoo.find("densenet121.prognosis_gcs3_age")
    hostile = "</p><script>alert(1)</script> | \n\n<img src=x onerror=alert(2)>\n# Title"
    task = dataclasses.replace(spec.tasks[0], meaning=hostile)
    citation = dataclasses.replace(spec.citation, text=hostile, url=hostile)
    licence = dataclasses.replace(spec.licence, data=hostile, weights=hostile, code=hostile)
    texts = {"summary": hostile, "notice": hostile, "intended_use": hostile, "limits": (hostile,)}
    changed = dataclasses.replace(spec, tasks=(task, *spec.tasks[1:]), citation=citation, licence=licence, **texts)
    text = export.build_card(changed, REPO)
    assert re.findall(r"<[a-zA-Z/!?]", text) == []
    row = next(line for line in text.splitlines() if line.startswith(f"| `{task.name}` |"))
    assert row.count(" | ") == next(line for line in text.splitlines() if line.startswith("| task |")).count(" | ")
    assert "`<80`" in export.build_card(ichprog.zoo.find("densenet121.age"), REPO)


def test_the_python_example_of_the_card_runs(on_the_hub, scan_path):
    server, _ = on_the_hub
    text = (server.root / REPO / "README.md").read_text()
    [code] = [block.split("```")[0] for block in text.split("```python\n")[1:]]
    exec(code.replace("scan.nii.gz", str(scan_path)), {})


# --- the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub.constants

    (tmp_path / "hub").mkdir()
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a loopback Hub has no store for Xet
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture
def run(two_fold_model):
    """Return the folder of a run, with files that name patients."""
    folder = Path(two_fold_model.removeprefix("local-dir:"))
    sums = {
        f"fold{k}.safetensors": ichprog.load_model(two_fold_model, runtime="torch").weights[k].sha256 for k in (0, 1)
    }
    record = {
        "source": "/hospital/smith/cohort.csv",
        "command": ["ichprog", "train", "/hospital/smith/cohort.csv"],
        "versions": {"torch": "2.9"},
        "membership": {"0": {"train": ["smith"]}},
        "protocol": {"epochs": 60, "schedule": "cosine"},
        "cohort": {"patients": 261, "sha256": "0"},
        "folds": 10,
        "results": {
            str(k): {"sha256": sums[f"fold{k}.safetensors"], "best": {"val_auc_prognosis": 0.6 + 0.1 * k}}
            for k in (0, 1)
        },
    }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "out_of_fold.csv").write_text("patient\nsmith\n")
    (folder / "folds").mkdir()
    return folder


@pytest.fixture
def on_the_hub(hub, run):
    return hub, export.publish(run, REPO)


def test_a_published_model_loads_from_an_empty_cache_with_equal_predictions(on_the_hub, run):
    server, name = on_the_hub
    assert name == f"hf-hub:{REPO}@{server.refs['main']}"
    assert sorted(p.name for p in (server.root / REPO).iterdir()) == [
        "README.md", "config.json", "fold0.safetensors", "fold1.safetensors",
    ]  # fmt: skip
    model, own = ichprog.load_model(name), ichprog.load_model(f"local-dir:{run}")
    assert set(model.spec.weights.sha256) == {"fold0.safetensors", "fold1.safetensors"}
    grids = np.random.default_rng(0).random((2, *own.spec.input.shape), np.float32)
    for task, values in mean_probabilities(own, grids).items():
        assert np.array_equal(mean_probabilities(model, grids)[task], values)
    assert len(server.requests_with("PUT /lfs/")) == 2
    assert len(server.requests_with("POST /lfs/")) == 2
    [(message, files)] = server.commits
    assert message == "bright.prognosis_gcs3_age, 2 folds, by ichprog 0.1.0"
    assert len(files) == 4


def test_no_file_that_names_patients_is_published(on_the_hub):
    server, _ = on_the_hub
    for path in (server.root / REPO).rglob("*"):
        assert b"smith" not in path.read_bytes()
    text = (server.root / REPO / "README.md").read_text()
    for said in ("| patients | 261 |", "2 of 10 are", "epochs 60, schedule cosine", "torch 2.9", "0.650 | 0.071"):
        assert said in text


def test_results_of_other_weights_are_left_out(run):
    state = load_file(run / "fold1.safetensors")
    save_file({key: value + 1 for key, value in state.items()}, run / "fold1.safetensors")
    text = export.prepare_upload(run, REPO).card
    assert "1 of 10 are published" in text
    assert "0.650" not in text


def test_publishing_again_makes_a_commit_only_for_changes(on_the_hub, run, capfd):
    server, first = on_the_hub
    assert export.publish(run, REPO) == first  # nothing changed, so there is no new commit
    (run / "fold1.safetensors").unlink()
    second = export.publish(run, REPO, message="one fold")
    assert second != first
    assert server.commits[-1] == ("one fold", ["README.md", "config.json", "fold1.safetensors"])
    assert len(ichprog.load_model(second).fold_runtimes) == 1
    assert tuple(capfd.readouterr()) == ("", "")


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"POST /api/repos/create": 401, "GET /api/models": 401}, r"HTTP 401.*`hf auth login`.*HF_TOKEN"),
        ({"POST /api/repos/create": 403, "GET /api/models": 403}, r"HTTP 403.*no write access.*`hf auth login`"),
        ({"/commit/": 403}, "HTTP 403.*no write access"),
        ({"/commit/": 412}, "HTTP 412.*changed during the upload"),
        ({"PUT /lfs": 403}, "HTTP 403"),
        ({"/preupload/": "404:RepoNotFound"}, "no such repository"),
    ],
)
def test_a_refusal_names_the_remedy(faults, message, hub, run):
    hub.faults.update(faults)
    with pytest.raises(WeightsError, match=f"^{REPO}: nothing was published: .*{message}"):
        export.publish(run, REPO)
    assert hub.commits == []


def test_a_wrong_or_missing_token_and_a_missing_network_are_reported(hub, run, monkeypatch, tmp_path):
    with pytest.raises(WeightsError, match=r"HTTP 403.*no write access.*HF_TOKEN"):
        export.publish(run, REPO, token="hf_reader")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.requests.clear()
    with pytest.raises(WeightsError, match=r"there is no token.*`hf auth login`"):
        export.publish(run, REPO)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        export.publish(run, REPO, token="hf_writer")
    assert hub.requests == []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"nothing was published.*cannot be reached"):
        export.publish(run, REPO, token="hf_writer")


def change(run, **weights):
    data = json.loads((run / "config.json").read_text())
    data["weights"].update(weights)
    (run / "config.json").write_text(json.dumps(data))


def test_an_incomplete_model_is_not_published(hub, run):
    for repo in ("bright", "org/bright/more", "org/a b", "org/a..b"):
        with pytest.raises(UnknownNameError, match="org/name"):
            export.publish(run, repo)
    with pytest.raises(SpecError, match=r"config\.json"):
        export.publish(run.parent / "nowhere", REPO)
    change(run, sha256={"fold7.safetensors": "0" * 64})
    with pytest.raises(WeightsError, match=r"fold7\.safetensors.*Restore the missing files"):
        export.publish(run, REPO)
    change(run, sha256={"fold1.safetensors": "0" * 64})
    with pytest.raises(WeightsError, match="SHA-256"):
        export.publish(run, REPO)
    change(run, sha256={})
    save_file({"a": torch.ones(1)}, run / "fold1.safetensors")
    with pytest.raises(WeightsError, match="keys do not fit"):
        export.publish(run, REPO)
    change(run, keys={"backbone.": "backbone.", "heads.": "heads."})
    (run / "fold1.safetensors").unlink()
    with pytest.raises(WeightsError, match="the format of another project"):
        export.publish(run, REPO)
    assert hub.requests == []


# --- a model that was trained from the description of another


@pytest.fixture(scope="module")
def trained_by_others(tmp_path_factory):
    """Return the embedded description in small, and runs that were trained from it on other patients."""
    embedded = zoo.find("compact.prognosis_gcs3_age")
    contract = dataclasses.replace(embedded.input, shape=SHAPE, expected_ranges={"no-blood": (None, None)})
    parent = dataclasses.replace(embedded, backbone=PluginRef("compact", {"width": 2}), input=contract)
    root = tmp_path_factory.mktemp("others")
    table, runs = write_cohort(root), {}
    for kind, record in (("given", None), ("simulated", {"simulation": 2, "seed": 3, "preset": "plain"})):
        if record:
            (root / "simulation.json").write_text(json.dumps(record))
        runs[kind] = train(table, parent, root / kind, name=f"mine.{kind}", **TRAINING, options=options_in(root))
    return parent, runs


TRAINING = {"folds": 2, "protocol": QUICK.replace(epochs=1)}


def options_in(root):
    return TrainOptions(cache_dir=root / "cache")


@pytest.fixture
def given_run(trained_by_others, tmp_path):
    """Return a copy of the run on patients that are not simulated."""
    return shutil.copytree(trained_by_others[1]["given"], tmp_path / "run")


def write_texts(run):
    """Write the texts of a run that are to be written, as its authors would."""
    path = run / "config.json"
    path.write_text(path.read_text().replace("To be written", "Written by Ada"))


@pytest.mark.parametrize("kind", ["given", "simulated"])
def test_a_trained_model_inherits_no_claim_of_its_description(kind, trained_by_others):
    parent, runs = trained_by_others
    card = export.prepare_upload(runs[kind], REPO).card
    claims = [parent.summary, parent.intended_use, parent.licence.weights, parent.citation.text, *parent.limits]
    for claim in (*claims, *(task.meaning for task in parent.tasks), "600 simulated", "0.801 ("):
        assert claim not in card
    rows = read_table(runs[kind] / "out_of_fold.csv")
    for task, last in (("prognosis", "poor"), ("age", ">=80")):
        auc = roc_auc_score([r[f"{task}_true"] == last for r in rows], [float(r[f"{task}_{last}"]) for r in rows])
        assert f"Out-of-fold AUC of {task}: {auc:.3f} (95 % interval " in card
        assert f"| `{task}` | {auc:.3f} | " in card
    assert "2 folds: 1 epochs at most" in card
    assert ("simulated" in card) is (kind == "simulated")
    assert ("Trained on 32 patients." in card) is (kind == "given")
    simulated = "Trained on 32 simulated patients (seed 3, preset plain) only, and on no real patient."
    assert (simulated in card) is (kind == "simulated")
    assert ("without any patient data" in card) is (kind == "simulated")
    assert ("Trained on simulated patients only. For research" in card) is (kind == "simulated")


def test_a_model_is_not_published_until_its_authors_have_written_their_texts(hub, given_run):
    fields = r"tasks\[0\]\.meaning, .*licence\.weights, licence\.data, citation\.text, intended_use, limits\[5\]"
    with pytest.raises(SpecError, match=rf"8 texts .* to be written: {fields}\. Open .*config\.json and replace"):
        export.publish(given_run, REPO)
    assert hub.requests == []
    shown = CliRunner().invoke(main, ["publish", str(given_run), REPO, "--dry-run"])
    assert shown.exit_code != 0
    assert "To be written: terms of use of the weights." in shown.stdout
    assert "intended_use" in shown.stderr
    write_texts(given_run)
    export.publish(given_run, REPO)
    card = (hub.root / REPO / "README.md").read_text()
    assert "Written by Ada: intended users and uses" in card
    assert "to be written" not in card.lower()


def test_texts_of_the_authors_survive_a_resumed_run(given_run, trained_by_others):
    parent, runs = trained_by_others
    (record := runs["given"].parent / "simulation.json").unlink()
    try:
        write_texts(given_run)
        before = ModelSpec.read(given_run / "config.json")
        settings = {**TRAINING, "name": "mine.given", "options": options_in(record.parent), "resume": True}
        train(record.parent / "cohort.csv", parent, given_run, **settings)
        assert ModelSpec.read(given_run / "config.json") == before
    finally:
        record.write_text('{"simulation": 2, "seed": 3, "preset": "plain"}')


def test_nothing_that_belongs_to_weights_is_inherited():
    parent, origin = zoo.find("compact.haemorrhage"), Origin(9, 0)
    spec = describe_training(parent, "mine", origin, 3, QUICK)
    [before], [after] = parent.tasks, spec.tasks
    assert before.threshold != 0.5
    assert before.mask.volume_intervals
    assert (after.threshold, after.mask.volume_intervals) == (0.5, {})
    assert (spec.golden_output, spec.weights.sha256) == (None, {})
    assert (after.labels, after.target, after.head, spec.input) == (
        before.labels, before.target, before.head, parent.input,
    )  # fmt: skip
    bare = dataclasses.replace(parent, weights=spec.weights)
    assert describe_training(bare, "mine", origin, 3, QUICK).tasks[0].threshold == before.threshold


def test_patients_of_mixed_origin_are_counted_in_the_texts():
    spec = describe_training(zoo.find("compact.prognosis_gcs3_age"), "mine", Origin(40, 12), 3, QUICK)
    assert "Trained on 40 patients, 12 of them simulated." in spec.summary
    assert spec.licence.data.startswith("12 of 40 patients are simulated. To be written")
    assert spec.notice.startswith("Trained in part on simulated patients.")
    assert "limits[2]" in spec.unwritten


# --- the command line


def test_the_commands_export_and_publish(hub, run, tmp_path):
    def call(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    done = call("export", f"local-dir:{run}", "-o", tmp_path / "out", "--fold", 1, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["folds"] == [1]
    assert Path(json.loads(done.stdout)["path"]).is_file()
    assert "For research only" in done.stderr
    assert call("export", f"local-dir:{run}", "-o", tmp_path / "out", "--format", "tflite").exit_code == 2

    done = call("publish", run, REPO, "--dry-run")
    assert "fold1.safetensors" in done.stdout
    assert done.stdout.endswith(export.prepare_upload(run, REPO).card)
    done = call("publish", f"local-dir:{run}", REPO, "--dry-run", "--json")
    assert list(json.loads(done.stdout)["files"]) == [
        "README.md", "config.json", "fold0.safetensors", "fold1.safetensors",
    ]  # fmt: skip
    assert hub.requests == []
    done = call("publish", run, REPO, "--private", "--message", "first", "--json")
    assert json.loads(done.stdout) == {"model": f"hf-hub:{REPO}@{hub.refs['main']}"}
    assert hub.commits[0][0] == "first"
    hub.token = "another"
    done = call("publish", run, REPO)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "hf auth login" in done.stderr
