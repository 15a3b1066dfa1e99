"""What an installation is made of: the wheel with its weights, the lock of all versions, and the bill of materials."""

import hashlib
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ichprog import zoo

ROOT = Path(__file__).parents[1]
PUBLIC_HOSTS = {
    "arxiv.org", "cyclonedx-bom-tool.readthedocs.io", "cyclonedx-python-library.readthedocs.io", "cyclonedx.org",
    "doi.org", "github.com", "pypi.org",
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel, and return it opened."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, check=True)
    with zipfile.ZipFile(*folder.iterdir()) as archive:
        yield archive


def test_the_wheel_has_all_embedded_weights_with_the_checksums_of_their_specs(wheel):
    expected = {}
    for spec in zoo.list_models():
        if spec.weights.repo is None:
            expected |= {f"ichprog/zoo/{spec.weights.folder}/{file}": pin for file, pin in spec.weights.sha256.items()}
            described = json.loads(wheel.read(f"ichprog/zoo/{spec.name}.json"))
            assert described["weights"]["sha256"] == dict(spec.weights.sha256)
    shipped = {name for name in wheel.namelist() if name.endswith(".safetensors")}
    assert shipped == expected.keys() != set()
    for name, pin in expected.items():
        assert hashlib.sha256(wheel.read(name)).hexdigest() == pin
    assert not [name for name in wheel.namelist() if name.endswith((".pth", ".pt", ".pkl", ".npy"))]


def locked():
    """Return the name and version of every package of the lock, with its checksums."""
    entries = (ROOT / "requirements.lock").read_text().replace("\\\n", "").splitlines()
    found = [
        re.fullmatch(r"([\w.-]+)==(\S+)( ; [^-]+?)?((?:\s+--hash=sha256:[0-9a-f]{64})+)", line) for line in entries
    ]
    assert all(found), [line for line, match in zip(entries, found, strict=True) if not match]
    return [(match[1], match[2], re.findall(r"sha256:(\w+)", match[4])) for match in found]


def test_the_lock_satisfies_every_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = {}
    for name, version, _ in locked():
        versions.setdefault(canonicalize_name(name), []).append(version)
    texts = project["dependencies"] + [each for extra in project["optional-dependencies"].values() for each in extra]
    required = [each for each in map(Requirement, texts) if each.name != "ichprog"]
    assert len(required) > 20
    for each in required:
        assert all(version in each.specifier for version in versions[canonicalize_name(each.name)]), each


def test_the_bill_of_materials_is_that_of_the_lock_and_names_public_hosts_only():
    bill = json.loads((ROOT / "sbom.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    assert bill["metadata"]["component"]["name"] == "ichprog"
    assert [(each["name"], each["version"]) for each in bill["components"]] == [(n, v) for n, v, _ in locked()]
    urls = re.findall(r"\w+://([^/\"]+)", (ROOT / "sbom.cdx.json").read_text())
    assert set(urls) <= PUBLIC_HOSTS
