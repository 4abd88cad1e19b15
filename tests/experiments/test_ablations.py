"""The ablations of Tables X and XI: each config is what it says, and differs from its base in nothing else."""

import shlex

import pytest
import yaml

from slimconv_lit.analysis.paper import entries
from slimconv_lit.config_files import load_config
from slimconv_lit.lightning_cli import preview
from slimconv_lit.lookup import CONFIGS

# File, and the row of the paper that it trains.
ROWS = {
    "imagenet_no_flip": ("X", "Sc-ResNet-50 (w/o flipping)"),
    "imagenet_only_flip": ("X", "Sc-ResNet-50 (only flipping)"),
    "imagenet_cosine": ("X", "Sc-ResNet-50 (cosine)"),
    "imagenet_test_256": ("X", "Sc-ResNet-50@256"),
    "cifar100_shuffle": ("XI", "Sc-ResNet-50-sf"),
    "cifar100_shuffle_3b": ("XI", "Sc-ResNet-50-3b-sf"),
}
FILES = sorted((CONFIGS / "ablation").glob("*.yaml"))


def test_there_is_one_for_each_row():
    assert {path.stem for path in FILES} == set(ROWS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_network_is_that_of_the_row(path, in_tmp):
    *python, verb, config, name = shlex.split(path.read_text().splitlines()[0].removeprefix("# "))[:6]
    assert (*python, verb, config) == ("python", "-m", "slimconv_lit", "fit", "--config")
    assert CONFIGS / name == path
    table, row = ROWS[path.stem]
    (entry,) = (entry for _, entry in entries(table) if entry["name"] == row)
    cost = preview(["--config", name])
    assert (cost["params"], cost["macs"]) == (entry["params"], entry["macs"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_one_thing_differs_from_the_base(path):
    base = load_config(path.parent / yaml.safe_load(path.read_text())["base"])

    def leaves(values, prefix=""):
        for key, value in values.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, str(value))]

    assert len(set(leaves(load_config(path))) - set(leaves(base))) == 1
