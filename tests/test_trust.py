"""Files from a stranger: nothing that they hold or name is run, unless the command line allows it."""

import json
import os

import pytest
import torch
import yaml
from pytorch_lightning.core import saving

from slimconv_lit import ClassificationTask
from slimconv_lit.cli import main, run_verb
from slimconv_lit.lookup import CONFIGS as SHIPPED

QUICKSTART = SHIPPED / "quickstart.yaml"
FIT = ["fit", "--config=quickstart.yaml", "--config=x.yaml", "--print_config"]


class Evil:
    """Unpickled as a call of `os.mkdir`."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture
def evil(in_tmp, monkeypatch):
    """A module `evil` that leaves the folder "ran" when it is imported."""
    monkeypatch.syspath_prepend(in_tmp)
    (in_tmp / "evil.py").write_text(
        "import os, pytorch_lightning as pl\nos.mkdir('ran')\nclass Back(pl.Callback): pass\n"
    )
    return in_tmp


def refused(words, capsys, *said):
    """That a command line ends with one line and status 2, and that nothing of `evil` has run."""
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for text in said:
        assert text in errors
    assert not os.path.exists("ran")


@pytest.mark.parametrize(
    "words",
    [
        ["test", "--ckpt_path=evil.ckpt"],
        ["fit", "--ckpt_path=evil.ckpt"],
        ["fit", "--config=quickstart.yaml", "--model.weights=evil.ckpt"],
        ["prune", "--ckpt_path=evil.ckpt"],
        ["explain", "--ckpt_path=evil.ckpt"],
        ["export", "--ckpt_path=evil.ckpt"],
        ["benchmark", "evil.ckpt"],
        ["compare", "evil_run", "--rounds=2"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_not_unpickled(words, zipped, in_tmp, capsys):
    (in_tmp / "evil_run" / "checkpoints").mkdir(parents=True)
    (in_tmp / "evil_run" / "config.yaml").write_text("name: x")
    for path in ("evil.ckpt", "evil_run/checkpoints/best.ckpt"):
        torch.save({"state_dict": {"w": Evil()}}, path, _use_new_zipfile_serialization=zipped)
    refused(words, capsys, ".ckpt")


def test_libraries_cannot_unpickle_either(in_tmp):
    torch.save(Evil(), "x.pth")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.hub.load_state_dict_from_url("http://localhost/x.pth", model_dir=".", weights_only=False)
    assert not os.path.exists("ran")


# A few lines that stand for billions of values.
ALIASES = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
BOMB = "{" + ", ".join(ALIASES) + "}"
MERGED = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 13))]

BACK = {"class_path": "evil.Back"}
CONFIGS = {
    "a callback": {"trainer": {"callbacks": [BACK]}},
    "a text": {"trainer": {"callbacks": "evil.Back"}},
    "a text in a text": {"trainer": {"callbacks": json.dumps([BACK])}},
    "a file that the file names": {"trainer": {"callbacks": ["back.yaml"]}},
    "a logger": {"trainer": {"logger": {"class_path": "evil.Back"}}},
    "a strategy": {"trainer": {"strategy": {"class_path": "evil.Back"}}},
    "a plugin": {"trainer": {"plugins": ["evil.Back"]}},
    "a task": {"model": {"class_path": "evil.Task", "init_args": {"backbone": "cifar_resnet20"}}},
    "an operator": {"model": {"init_args": {"operator": {"class_path": "evil.Op"}}}},
    "data": {"data": {"class_path": "evil.Data"}},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_names_classes_of_known_packages_alone(config, evil, capsys):
    (evil / "x.yaml").write_text(yaml.safe_dump(config))
    (evil / "back.yaml").write_text(yaml.safe_dump(BACK))
    refused(FIT, capsys, "--allow-import evil")


@pytest.mark.parametrize(
    "name",
    [
        "subprocess.Popen",
        "torch.hub.load",
        "torch.nn.functional.importlib.import_module",
        "torch.nn.modules.module.functools.partial",
        "slimconv_lit.cli.os.system",
        "slimconv_lit.cli.main",
        "slimconv_lit.tasks.ClassificationTask.load_from_checkpoint",
    ],
)
def test_other_code_is_not_reached_through_a_known_package(name, in_tmp, capsys):
    lambdas = "pytorch_lightning.callbacks.LambdaCallback"
    for callback in (
        {"class_path": name, "init_args": {"path": "ran"}},
        {"class_path": lambdas, "init_args": {"on_fit_start": {"class_path": name}}},
    ):
        (in_tmp / "x.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
        refused(FIT, capsys)


def test_who_trusts_a_package_says_so(evil, capsys):
    # Of another name than that of the other tests: what is allowed stays so until the process ends.
    (evil / "evil.py").rename("trusted.py")
    (evil / "x.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": ["trusted.Back"]}}))
    (evil / "allowing.yaml").write_text("allow-import: trusted")
    refused(["fit", "--config=quickstart.yaml", "--config=allowing.yaml", "--print_config"], capsys, "not accepted")
    refused([*FIT, "--allow-import"], capsys, "a name is missing: --allow-import my_package")
    refused([*FIT, "--allow-import=jsonargparse"], capsys, "jsonargparse")
    refused([*FIT, "--allow-import=trust"], capsys, "--allow-import trusted")
    assert main([*FIT, "--allow-import=trusted"]) == 0
    assert "trusted.Back" in capsys.readouterr().out
    assert (evil / "ran").is_dir()


@pytest.mark.parametrize(
    "carried",
    [
        {"hyper_parameters": {"_class_path": "evil.Task", "backbone": "cifar_resnet20"}},
        {"class_paths": {"model": "evil.Task"}},
        {"class_paths": {"model": "slimconv_lit.cli.main"}},
        {"hyper_parameters": {"_instantiator": "evil.build", "_class_path": "evil.Task"}},
        {"hyper_parameters": {"backbone": "x", "operator": {"class_path": "evil.Op"}}},
        {"hyper_parameters": ["no mapping"]},
    ],
    ids=str,
)
def test_a_checkpoint_names_classes_of_known_packages_alone(carried, evil, capsys):
    (evil / "run" / "checkpoints").mkdir(parents=True)
    (evil / "run" / "config.yaml").write_text("name: x")
    paths = {"model": "slimconv_lit.tasks.ClassificationTask", "data": "slimconv_lit.data.DigitsDataModule"}
    torch.save({"class_paths": paths, "state_dict": {}} | carried, "run/checkpoints/last.ckpt")
    refused(["test", "--ckpt_path=run/checkpoints/last.ckpt"], capsys)
    refused(["compare", "run", "--rounds=2"], capsys)


def test_what_a_checkpoint_names_as_its_maker_is_not_called(evil, monkeypatch, capsys):
    # As Lightning was up to 2.6.5, where it is called whatever it is.
    monkeypatch.setattr(saving, "_ALLOWED_INSTANTIATORS", {"evil.build"})
    (evil / "run" / "checkpoints").mkdir(parents=True)
    (evil / "run" / "config.yaml").write_text("name: x")
    task = ClassificationTask("cifar_resnet20", num_classes=10, in_channels=1)
    paths = {"model": "slimconv_lit.tasks.ClassificationTask", "data": "slimconv_lit.data.DigitsDataModule"}
    held = {"class_paths": paths, "state_dict": task.state_dict()}
    torch.save(
        held | {"hyper_parameters": dict(task.hparams) | {"_instantiator": "evil.build"}}, "run/checkpoints/last.ckpt"
    )
    assert main(["compare", "run", "--rounds=2"]) == 0
    assert not os.path.exists("ran")


ODD = {
    "no weights": ({"state_dict": None}, "'state_dict'"),
    "a number as weights": ({"state_dict": {"a": 3}}, "'state_dict': 'a' is a int"),
    "plans": ({"pruned": 3}, "'pruned' is no mapping"),
    "a plan": ({"pruned": {"": 3}}, "'pruned': '' is a int"),
    "sums": ({"train_means": 3}, "'train_means' is no mapping"),
    "a sum": ({"train_means": {"images": torch.ones(1)}}, "'totals' and 'images'"),
    "sums of another shape": ({"train_means": {"images": torch.ones(1), "totals": torch.ones(1, 9)}}, "x.ckpt"),
    "a tensor": ({"hyper_parameters": {"backbone": "cifar_resnet20", "lr": torch.ones(2)}}, "a Tensor is no number"),
    "bombs": ({"hyper_parameters": {"backbone": BOMB}}, "aliases"),
    "classes": ({"class_paths": [1]}, "'class_paths' is no mapping"),
    "data": ({"DigitsDataModule": 3}, "'DigitsDataModule' is no mapping"),
}


@pytest.mark.parametrize(("content", "said"), ODD.values(), ids=ODD)
def test_checkpoints_with_something_else_in_them(content, said, in_tmp, capsys):
    task = ClassificationTask("cifar_resnet20", num_classes=10, in_channels=1)
    paths = {"model": "slimconv_lit.tasks.ClassificationTask", "data": "slimconv_lit.data.DigitsDataModule"}
    whole = {"class_paths": paths, "state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams)} | content
    torch.save({key: value for key, value in whole.items() if value is not None}, "x.ckpt")
    for verb in ("test", "explain", "export"):
        refused([verb, "--ckpt_path=x.ckpt"], capsys, said)


def test_a_sweep_cannot_allow_itself(evil, capsys):
    sweep = {
        "method": "grid",
        "metric": {"name": "test/top1", "goal": "maximize"},
        "parameters": {"model.lr": {"values": [0.1]}},
        "command": ["-m", "slimconv_lit", "fit", "--config=quickstart.yaml", "${args}"],
    }
    for changes in (
        {"command": [*sweep["command"], "--allow-import=evil"]},
        {"command": [*sweep["command"], "--allow_import", "evil"]},
        {"parameters": {"allow-import": {"value": "evil"}}},
    ):
        (evil / "s.yaml").write_text(yaml.safe_dump(sweep | changes))
        refused(["sweep", "s.yaml", "--dry_run"], capsys, "a file cannot say --allow-import")
    (evil / "s.yaml").write_text(yaml.safe_dump(sweep | {"parameters": {"trainer.callbacks": {"value": "evil.Back"}}}))
    assert main(["sweep", "s.yaml", "--dry_run"]) == 0
    assert "cannot be built: trainer.callbacks: evil.Back is of no package" in capsys.readouterr().out
    assert not os.path.exists("ran")


@pytest.mark.parametrize("key", ["allow-import", "allow_import", "ratio=0.3 --allow-import", "config", "print_config"])
def test_the_section_of_prune_cannot_allow_itself(key, evil, capsys):
    config = {"base": str(QUICKSTART), "trainer": {"callbacks": [BACK]}, "prune": {"ratio": 0.3, key: "evil"}}
    (evil / "x.yaml").write_text(yaml.safe_dump(config))
    refused(["prune", "--config=x.yaml"], capsys, f"`prune:` has no {key!r}")
    # As it comes with a folder that was downloaded.
    (evil / "run" / "checkpoints").mkdir(parents=True)
    (evil / "x.yaml").rename(evil / "run" / "config.yaml")
    torch.save({"state_dict": {}}, "run/checkpoints/last.ckpt")
    refused(["prune", "--ckpt_path=run/checkpoints/last.ckpt"], capsys, f"`prune:` has no {key!r}")


def test_no_parser_knows_the_option(evil, capsys):
    (evil / "x.yaml").write_text(yaml.safe_dump(CONFIGS["a callback"]))
    # Words that a verb has put together, as a sweep does from its file.
    assert run_verb("fit", [*FIT[1:], "--allow-import=evil"]) == 2
    assert run_verb("profile", ["cifar_resnet20", "--operator=evil.Op", "--allow-import=evil"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
    assert not os.path.exists("ran")


def test_what_is_typed_follows_the_same_rule(evil, capsys):
    refused(["profile", "cifar_resnet20", "--operator=evil.Op"], capsys, "--allow-import evil")
    refused(["fit", "--config=quickstart.yaml", "--trainer.callbacks=evil.Back"], capsys, "--allow-import evil")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a [*a]", "deep"),
        ("- " * 60, "50 deep"),
        ("a: " + "[" * 400_000, "50 deep"),
        ("a: '" + "[" * 20_000 + "'", "10,000 characters"),
        ("a: b\n" * 300_000, "1,048,576 bytes"),
        ("base: x.yaml", "start from one another"),
        ("base: [{}]", "`base` is the name of a file"),
        ("model: [1]", "subclass of BaseTask"),
        ("name: [1]", "name"),
        ("\n".join(ALIASES), "100,000"),
        ("\n".join(MERGED), "100,000"),
        ("a: &a {b: &b {<<: [*a, *a], c: {<<: [*b, *b]}}}", "deep"),
        ("? [1]\n: 2", "x.yaml"),
        (yaml.safe_dump({"model": {"init_args": {"backbone_options": BOMB}}}), "aliases"),
        (yaml.safe_dump({"trainer": {"logger": json.dumps({"a": BOMB}).replace("&", "\\u0026")}}), "aliases"),
        ("a: \ud800".encode("utf-8", "surrogatepass"), "x.yaml"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_configs_that_are_bombs_or_no_configs(text, said, in_tmp, capsys):
    (in_tmp / "x.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(FIT, capsys, said)


@pytest.mark.parametrize("text", ["[" * 400_000, "\n".join(MERGED), "a: b\n" * 300_000], ids=lambda text: text[:20])
def test_files_that_a_config_names_are_no_bombs_either(text, in_tmp, capsys):
    (in_tmp / "x.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": ["named.yaml"]}}))
    (in_tmp / "named.yaml").write_text(text)
    refused(FIT, capsys)
