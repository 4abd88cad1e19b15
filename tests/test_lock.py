"""The lock files: what `make lock` pins is what requirements.txt asks for, by hash, and none of the bad releases."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
LOCKS = ("requirements.lock", "requirements-dev.lock")
# Malicious uploads, and a build in which torchvision's operators do not load.
BAD = {"pytorch-lightning": ["2.6.2", "2.6.3"], "lightning": ["2.6.2", "2.6.3"], "torch": ["2.13.0"]}


def pinned(name):
    """Version, marker and number of hashes of each entry: (name, version, rest, hashes)."""
    text = (ROOT / name).read_text()
    entries = re.split(r"\n(?=[a-z0-9])", "\n" + "\n".join(li for li in text.splitlines() if not re.match(r"\s*#", li)))
    for entry in filter(str.strip, entries):
        head = re.match(r"([a-z0-9._-]+)==([^\s;]+)", entry)
        assert head, entry[:80]
        yield head[1], head[2], len(re.findall(r"--hash=sha256:[0-9a-f]{64}\b", entry))


def asked():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("name", LOCKS)
def test_everything_that_is_asked_for_is_pinned_by_hash(name):
    entries = list(pinned(name))
    assert len(entries) > 50
    assert all(hashes for *_, hashes in entries)
    versions = {package: version for package, version, _ in entries}
    for requirement in asked():
        assert requirement.specifier.contains(versions[requirement.name.lower()]), requirement


@pytest.mark.parametrize("name", LOCKS)
def test_no_release_that_is_known_to_be_bad(name):
    for package, version, _ in pinned(name):
        assert version not in BAD.get(package, ())


def test_the_bad_releases_are_not_let_in_without_a_lock_either():
    (lightning,) = [r for r in asked() if r.name == "pytorch-lightning"]
    assert not any(lightning.specifier.contains(version) for version in BAD["pytorch-lightning"])
    (torch,) = [r for r in asked() if r.name == "torch"]
    assert not any(part.operator == "==" for part in torch.specifier)


@pytest.mark.parametrize("name", LOCKS)
def test_a_lock_names_no_place(name):
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "index-url" not in text
