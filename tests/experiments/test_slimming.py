import csv
import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from slimconv_lit import ClassificationTask, create_backbone, load_weights, plans_of, prune
from slimconv_lit.cli import main
from slimconv_lit.experiments import slimming
from slimconv_lit.lookup import CONFIGS
from slimconv_lit.surgery import prunable_norms

SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]
QUIET = ["--trainer.enable_progress_bar=false", "--logger=csv"]
OPTIONS = [*SHORT, *QUIET]
LOOP = ["prune", "--config=small.yaml", "--multi_pass=2", *OPTIONS]


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """Two passes over a small pre-activation network with SlimConv, broken off once before the second pruning."""
    root = tmp_path_factory.mktemp("slimming")
    config = {
        "base": str(CONFIGS / "quickstart.yaml"),
        "model": {"init_args": {"backbone": "cifar_preresnet20", "operator": "SlimConv2d"}},
        "prune": {"ratio": 0.4, "streams": "select", "sparsity": {"strength": 1e-3}, "finetune": {}},
    }
    config["prune"]["finetune"] = {"model": {"init_args": {"lr": 0.01}}}
    (root / "small.yaml").write_text(yaml.safe_dump(config))
    real = slimming._save_pruned

    def crash(trained, task, target):
        # Not "2-prune": that is how the name of a run ends which began in a second such as :32.
        if "/2-prune/" in str(target):
            raise KeyboardInterrupt
        real(trained, task, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(slimming, "_save_pruned", crash)
        with pytest.raises(KeyboardInterrupt):
            main(LOOP)
    return root


def stages(folder):
    return {path.parent.name for path in folder.glob("*/stage.json")}


def runs(folder):
    return {path.parent.relative_to(folder) for path in folder.glob("*/*/config.yaml")}


def test_it_goes_on_where_it_was_broken_off(loop, monkeypatch, capsys):
    monkeypatch.chdir(loop)
    folder = loop / "runs" / "small-prune"
    assert stages(folder) == {"1-sparse", "1-prune", "1-finetune", "2-sparse"}
    before = runs(folder)
    assert main(LOOP) == 0
    said = capsys.readouterr().out
    assert [line.partition(":")[0] for line in said.splitlines() if line.endswith("done before")] == [
        *("1-sparse", "1-prune", "1-finetune", "2-sparse")
    ]
    assert {path.parts[0] for path in runs(folder) - before} == {"2-prune", "2-finetune"}

    with (folder / "slimming.csv").open() as file:
        rows = {row["stage"]: row for row in csv.DictReader(file)}
    labels = ["1 sparse", "1 pruned", "1 fine-tuned", "2 sparse", "2 pruned", "2 fine-tuned"]
    assert list(rows) == labels
    widths = [int(rows[label]["params"]) for label in labels]
    assert widths[0] > widths[1] == widths[2] == widths[3] > widths[4] == widths[5]
    assert [bool(rows[label]["latency ms"]) for label in labels] == [True, False, True, False, False, True]
    assert (folder / "slimming.png").stat().st_size > 5000
    assert len(list(folder.glob("*-prune/*/pictures/widths.png"))) >= 2

    # A penalty while sparsifying alone, and scales that were learned are not set to 0.5 again.
    configs = {path.parent.name: yaml.safe_load(path.read_text()) for path in folder.glob("*/stage.yaml")}
    callbacks = {name: config["trainer"]["callbacks"] for name, config in configs.items()}
    assert callbacks["1-finetune"] == callbacks["2-finetune"] == []
    assert callbacks["1-sparse"][0]["init_args"] == {"strength": 1e-3}
    assert callbacks["2-sparse"][0]["init_args"] == {"strength": 1e-3, "initial_scale": None}
    assert configs["1-finetune"]["model"]["init_args"]["lr"] == 0.01


def test_a_damaged_record_is_made_anew(loop, monkeypatch, capsys):
    monkeypatch.chdir(loop)
    assert main(LOOP) == 0
    capsys.readouterr()
    record = loop / "runs" / "small-prune" / "2-finetune" / "stage.json"
    record.write_text(record.read_text()[:20])
    assert main(LOOP) == 0
    assert "2-prune: done before" in (said := capsys.readouterr().out)
    assert "2-finetune: in" in said
    assert json.loads(record.read_text())["checkpoint"].endswith("best.ckpt")


@pytest.fixture(scope="module")
def pruned(loop):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(loop)
        assert main(LOOP) == 0
    stage = json.loads((loop / "runs" / "small-prune" / "2-finetune" / "stage.json").read_text())
    return loop / stage["checkpoint"]


def test_the_checkpoint_alone_is_enough(loop, pruned, monkeypatch):
    monkeypatch.chdir(loop)
    # In a fresh process, which knows nothing of this one.
    code = f"""
import torch
from slimconv_lit import ClassificationTask
task = ClassificationTask.load_from_checkpoint({str(pruned)!r}, weights_only=True, map_location="cpu").eval()
print(sum(p.numel() for p in task.model.parameters()), task.model(torch.ones(1, 1, 16, 16)).shape)
torch.export.export(task.model, (torch.ones(1, 1, 16, 16),))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    task = ClassificationTask.load_from_checkpoint(pruned, weights_only=True, map_location="cpu")
    assert done.stdout.split()[0] == str(sum(p.numel() for p in task.model.parameters()))
    assert len(plans_of(task.model)[""]) == 2

    assert main(["test", f"--ckpt_path={pruned}", *QUIET]) == 0
    # Going on with it: its own optimizer has the pruned parameters.
    going_on = ["--trainer.max_epochs=2", *OPTIONS[1:], "--model.ema_decay=0.9", "--test_after=false"]
    assert main(["fit", f"--ckpt_path={pruned}", *going_on]) == 0


def test_a_network_goes_on_that_was_not_trained_since_it_was_pruned(loop, monkeypatch, capsys):
    monkeypatch.chdir(loop)
    (before,) = (loop / "runs" / "small-prune" / "2-prune").glob("*/checkpoints/pruned.ckpt")
    # Its folder is that of a network which was opened, and tells the recipe of the training all the same.
    assert main(["fit", f"--ckpt_path={before}", "--test_after=false"]) == 0
    assert "a new fit starts from its weights" in capsys.readouterr().out
    (last,) = loop.glob("runs/2-prune/*/checkpoints/last.ckpt")
    held = torch.load(last, weights_only=True)
    assert held["pruned"] == torch.load(before, weights_only=True)["pruned"]
    assert held["global_step"] == 2


def test_a_checkpoint_is_pruned_again(loop, pruned, monkeypatch, capsys):
    monkeypatch.chdir(loop)
    (before,) = (loop / "runs" / "small-prune" / "2-prune").glob("*/checkpoints/pruned.ckpt")
    given = shutil.copy(before, before.with_name("given.ckpt"))
    words = [f"--ckpt_path={given}", "--ratio=0.3", "--streams=select", "--name=again", *OPTIONS]
    assert main(["prune", *words]) == 0
    with (loop / "runs" / "again" / "slimming.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == ["given", "1 pruned", "1 fine-tuned"]
    assert int(rows[1]["params"]) < int(rows[0]["params"])

    # The same path, and not the same weights any more.
    content = torch.load(given, weights_only=True)
    content["state_dict"]["model.fc.bias"] += 1
    torch.save(content, given)
    capsys.readouterr()
    # It need not go on from there.
    monkeypatch.setattr(slimming, "_save_pruned", lambda *_: pytest.fail("pruned anew"))
    with pytest.raises(pytest.fail.Exception, match="pruned anew"):
        main(["prune", *words])
    assert "1-prune: in" in capsys.readouterr().out


def test_weights_of_a_pruned_network(tmp_path):
    torch.manual_seed(0)
    model = create_backbone("cifar_resnet20", "SlimConv2d", num_classes=10).eval()
    prune(model, 0.5)
    torch.save({"state_dict": model.state_dict(), "pruned": plans_of(model)}, tmp_path / "pruned.pt")
    fresh = create_backbone("cifar_resnet20", "SlimConv2d", num_classes=10).eval()
    report = load_weights(fresh, tmp_path / "pruned.pt")
    assert report.missing == ()
    assert report.left_over == ()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh(images), model(images))
    # A network that has this shape already is not pruned once more.
    load_weights(fresh, tmp_path / "pruned.pt")
    assert torch.equal(fresh(images), model(images))

    deeper = create_backbone("cifar_resnet56", num_classes=10)
    count = sum(p.numel() for p in deeper.parameters())
    with pytest.raises(ValueError, match=r"pruned\.pt.*nothing was loaded"):
        load_weights(deeper, tmp_path / "pruned.pt")
    assert sum(p.numel() for p in deeper.parameters()) == count
    assert plans_of(deeper) == {}
    # Other classes: the plan fits and the classifier does not, so the network gets its channels back.
    wider = create_backbone("cifar_resnet20", "SlimConv2d", num_classes=7)
    count = sum(p.numel() for p in wider.parameters())
    with pytest.raises(ValueError, match=r"fc\.weight.*nothing was loaded"):
        load_weights(wider, tmp_path / "pruned.pt")
    assert sum(p.numel() for p in wider.parameters()) == count
    assert plans_of(wider) == {}
    torch.save({"state_dict": model.state_dict(), "pruned": {"": [{"kept": 3}]}}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match=r"odd\.pt: this is no plan"):
        load_weights(wider, tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "needs --config, or --ckpt_path"),
        (["--config=quickstart.yaml", "--ratio=1.2"], "ratio=1.2 is not at least 0 and below 1"),
        (["--config=quickstart.yaml", "--ratio=half"], "ratio"),
        (["--config=quickstart.yaml", "--multi_pass=0"], "multi_pass=0 must be at least 1"),
        (["--config=quickstart.yaml", "--streams=kept"], "streams"),
        (["--config=nowhere.yaml"], "there is no 'nowhere.yaml'"),
        (["--config=typo.yaml"], "ratio"),
        (["--config=det_sample.yaml"], "not detectors"),
        (["--config=quickstart.yaml", "--model.backbone=torchvision:squeezenet1_1"], "no batch norm"),
        (["--ckpt_path=nowhere.ckpt"], "no file 'nowhere.ckpt'"),
    ],
)
def test_mistakes_are_known_before_anything_is_trained(words, problem, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = str(CONFIGS / "quickstart.yaml")
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump({"base": base, "prune": {"ratoi": 0.5}}))
    assert main(["prune", *words]) == 2
    assert problem in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.parametrize("path", sorted((CONFIGS / "pruning").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert path.read_text().startswith(f"# python -m slimconv_lit prune --config {path.name}\n")
    # Found by its name.
    assert main(["prune", f"--config={path.name}", "--multi_pass=0"]) == 2
    assert "multi_pass=0 must be at least 1" in capsys.readouterr().err
    recipe = slimming.load_config(path)
    options = slimming.read_options(recipe.pop("prune"), {})
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(recipe))
    cli = slimming.build_fit(["--config=fit.yaml"])
    assert len(prunable_norms(cli.model.model, exclude=options.exclude)) > 10
