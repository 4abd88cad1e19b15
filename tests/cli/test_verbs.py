"""The verbs through `main`, as a user types them; every config of the checkout runs here."""

import csv
import json
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning.loggers import WandbLogger

from slimconv_lit.cli import main
from slimconv_lit.lightning_cli import run
from slimconv_lit.lookup import CONFIGS
from slimconv_lit.tasks import ClassificationTask

SHORT = [
    "--trainer.max_epochs=1",
    *(f"--trainer.limit_{stage}_batches=2" for stage in ("train", "val", "test", "predict")),
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
]
DIGITS = ["--config", "quickstart.yaml", *SHORT]
SLIM = ["--model.operator=SlimConv2d", "--model.operator.k=8/3"]
# By how a config's name begins: what `predict` writes, and what makes its network small enough to run here.
PREDICTED = {"cls": "predictions.csv", "det": "predictions.json", "quickstart": "predictions.csv", "seg": "predictions"}
SMALLER = {
    "det": [
        "--model.min_size=64",
        "--trainer.check_val_every_n_epoch=1",
        '--model.head={"rpn_post_nms_top_n_test": 8, "box_batch_size_per_image": 8}',
    ],
    "seg": ["--data.crop_size=65"],
}


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """Where the sample data sets are built, once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of a short fit of a slim network on digits."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["fit", *DIGITS, *SLIM]) == 0
    (folder,) = (root / "runs" / "quickstart").iterdir()
    return folder


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_trains_tests_and_predicts(path, in_tmp, data_root):
    first_line = path.read_text().splitlines()[0]
    # The command in the first line, with sample data and little of them.
    python, dash_m, package, *words = shlex.split(first_line.removeprefix("# "))
    assert (python, dash_m, package) == ("python", "-m", "slimconv_lit")
    assert path.name in words
    kind = path.stem.partition("_")[0]
    small = [*SHORT, "--data.batch_size=2", "--data.num_workers=0", *SMALLER.get(kind, ())]
    if "Digits" not in path.read_text():
        small += ["--data.sample=true", f"--data.root={data_root}"]
    assert main([*words, *small]) == 0
    (fitted,) = (in_tmp / "runs" / path.stem).iterdir()
    assert json.loads((fitted / "results.json").read_text())["params"] > 0
    for verb, product in (("test", "per_class.csv"), ("predict", PREDICTED[kind])):
        assert main([verb, "--ckpt_path=last", *small[1:]]) == 0
        (folder,) = (in_tmp / "runs" / path.stem).glob(f"*-{verb}")
        assert (folder / product).exists()


def test_a_fit_leaves_a_whole_run_folder(trained, capsys):
    assert {path.name for path in trained.iterdir()} == {
        "config.yaml",
        "metrics.csv",
        "tensorboard",
        "checkpoints",
        "pictures",
        "results.json",
        "per_class.csv",
        ".lock",
    }
    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {path.name for path in (trained / "pictures").iterdir()} == {"validation.png", "confusion.png"}
    config = yaml.safe_load((trained / "config.yaml").read_text())
    arguments = config["model"]["init_args"]
    # Linked from the datamodule.
    assert (arguments["num_classes"], arguments["in_channels"]) == (10, 1)
    assert arguments["operator"]["init_args"]["k"] == "8/3"
    assert config["trainer"]["limit_train_batches"] == 2
    results = json.loads((trained / "results.json").read_text())
    assert results["network"] == "cifar_resnet20 + SlimConv2d k=8/3"
    assert {"test/top1", "test/top5", "params", "macs", "seconds"} <= set(results)
    with (trained / "metrics.csv").open() as file:
        assert {"epoch", "train/loss", "train/top1", "val/loss", "val/top1"} <= set(next(csv.reader(file)))


@pytest.mark.parametrize("verb", ["test", "validate", "predict"])
def test_a_checkpoint_alone_is_enough(verb, trained, in_tmp):
    cli = run(verb, [f"--ckpt_path={trained / 'checkpoints' / 'last.ckpt'}", *SHORT[1:]])
    assert cli.model.hparams["operator"]["init_args"]["k"] == "8/3"
    assert cli.model.hparams["num_classes"] == 10
    assert cli.datamodule.batch_size == 64
    state = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(cli.model.state_dict()["model.fc.weight"], state["model.fc.weight"])
    # Named after the run that made it, apart from it.
    assert cli.run_folder.path.parent.name == "quickstart"
    assert cli.run_folder.path.name.endswith(verb)


def test_the_command_line_beats_configs_and_they_beat_the_checkpoint(trained, in_tmp):
    (in_tmp / "x.yaml").write_text("data:\n  init_args: {batch_size: 9, eval_batch_size: 9}\nname: other")
    words = [f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}", "--config=x.yaml", "--data.batch_size=7"]
    cli = run("test", [*words, "--model.label_smoothing=0.3", *SHORT[1:]])
    assert (cli.datamodule.batch_size, cli.datamodule.eval_batch_size) == (7, 9)
    assert cli.model.hparams["label_smoothing"] == 0.3
    assert cli.model.hparams["operator"]["init_args"]["k"] == "8/3"
    assert cli.run_folder.path.parent.name == "other"


def test_a_checkpoint_of_the_command_line_opens_in_python(trained):
    task = ClassificationTask.load_from_checkpoint(trained / "checkpoints" / "best.ckpt", weights_only=True)
    assert task(torch.zeros(1, 1, 16, 16)).shape == (1, 10)


def test_a_checkpoint_made_in_python_is_enough_for_the_command_line(in_tmp):
    import pytorch_lightning as pl

    from slimconv_lit.data import DigitsDataModule
    from slimconv_lit.ops import SlimConv2d

    task = ClassificationTask("cifar_resnet20", 10, 1, operator=SlimConv2d)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1, enable_checkpointing=False, **quiet)
    trainer.fit(task, datamodule=DigitsDataModule(batch_size=8))
    trainer.save_checkpoint("x.ckpt")
    cli = run("test", ["--ckpt_path=x.ckpt", *SHORT[1:]])
    assert cli.datamodule.batch_size == 8
    assert cli.model.hparams["operator"]["class_path"].endswith("SlimConv2d")


def test_predictions_of_a_folder(trained, in_tmp):
    (in_tmp / "photos").mkdir()
    for number in range(3):
        Image.new("L", (20, 30), number * 90).save(in_tmp / "photos" / f"{number}.png")
    checkpoint = trained / "checkpoints" / "best.ckpt"
    cli = run("predict", [f"--ckpt_path={checkpoint}", "--data", "photos", "--data.eval_batch_size=2"])
    with (cli.run_folder.path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["0.png", "1.png", "2.png"]
    assert all(row["class"] in cli.datamodule.class_names and 0 < float(row["probability"]) <= 1 for row in rows)
    assert (cli.run_folder.path / "pictures" / "predictions.png").is_file()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_broken_is_named_in_one_line(workers, trained, in_tmp, capsys):
    (in_tmp / "photos").mkdir()
    (in_tmp / "photos" / "broken.jpg").write_bytes(b"no picture")
    words = [
        f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}",
        "--data",
        "photos",
        f"--data.num_workers={workers}",
    ]
    assert main(["predict", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: photos/broken.jpg cannot be decoded")
    assert line.endswith("or take it out")


def test_a_test_prints_and_keeps_what_a_fit_does(trained, in_tmp, capsys, caplog):
    cli = run("test", [f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}", *SHORT])
    results = json.loads((cli.run_folder.path / "results.json").read_text())
    of_fit = json.loads((trained / "results.json").read_text())
    # Two batches are few of the training images, and all of the others.
    assert of_fit.pop("limited") == "limit_train_batches=2"
    assert results == {k: v for k, v in of_fit.items() if k != "seconds"}
    said = capsys.readouterr().out
    assert said.partition("test/top1 %")[0].strip().startswith("network")
    assert "*" not in said
    assert [record.getMessage().partition(" from ")[0] for record in caplog.records] == ["Loaded model weights"]


def test_what_is_measured_on_a_part_of_the_data_is_marked(trained, in_tmp, capsys):
    words = [f"--ckpt_path={trained / 'checkpoints' / 'best.ckpt'}", *SHORT, "--data.eval_batch_size=64"]
    cli = run("test", words)
    assert json.loads((cli.run_folder.path / "results.json").read_text())["limited"] == "limit_test_batches=2"
    said = capsys.readouterr().out
    assert "cifar_resnet20 + SlimConv2d k=8/3 *  " in said
    assert "\n* of a part of the data only: limit_test_batches=2\n" in said
    run("validate", [*words, "--trainer.limit_val_batches=0.5"])
    assert "of a part of the data only: limit_val_batches=0.5\n" in capsys.readouterr().out


def test_resume_alone_goes_on_in_its_folder_with_its_own_settings(in_tmp):
    whole = ["fit", *DIGITS, "--model.schedule=constant", "--model.lr=0.01", "--test_after=false"]
    assert main([*whole, "--trainer.max_epochs=2", "--name=whole"]) == 0
    assert main([*whole, "--name=part"]) == 0
    assert main(["fit", "--ckpt_path=last", "--name=part", "--trainer.max_epochs=2"]) == 0
    (part,), (straight,) = ((in_tmp / "runs" / name).iterdir() for name in ("part", "whole"))
    with (part / "metrics.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1"}
    # Exactly where it was: the weights are those of a run without a break.
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (straight, part)]
    for name, value in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][name], value, rtol=0, atol=0)
    # From another checkpoint a new run begins.
    assert main(["fit", "--ckpt_path=best", "--name=part", "--trainer.max_epochs=3"]) == 0
    assert len(list((in_tmp / "runs" / "part").iterdir())) == 2


def test_a_run_s_config_runs_again_under_the_same_name(trained, in_tmp):
    assert main(["fit", "--config", str(trained / "config.yaml"), "--test_after=false"]) == 0
    (again,) = (in_tmp / "runs" / "quickstart").iterdir()
    assert (again / "config.yaml").read_text().replace("test_after: false", "test_after: true") == (
        trained / "config.yaml"
    ).read_text()


def test_what_the_wandb_agent_types(in_tmp):
    """The agent emits `--key=value`, dotted keys and whole dictionaries as they stand in the sweep."""
    words = ["--config=cls_cifar100.yaml", "--model.operator.k=2", "--model.lr=0.05", "--data.sample=True"]
    words += ['--model.backbone_options={"exclude": "layer1.*"}', "--data.num_workers=0", "--data.batch_size=2"]
    cli = run("fit", [*words, *SHORT, "--trainer.fast_dev_run=True", "--model.backbone=cifar_resnet20"])
    assert cli.model.hparams["operator"]["init_args"]["k"] == 2
    assert cli.model.hparams["lr"] == 0.05
    assert not (in_tmp / "runs").exists(), "fast_dev_run leaves nothing behind"


def test_wandb_gets_the_nested_config_once(in_tmp):
    cli = run("fit", [*DIGITS, "--logger=wandb"])
    (logger,) = (logger for logger in cli.trainer.loggers if isinstance(logger, WandbLogger))
    config = dict(logger.experiment.config)
    assert config["model"]["init_args"]["num_classes"] == 10
    assert "lr" not in config
    assert "num_classes" not in config
    assert list(cli.run_folder.path.glob("wandb/offline-run-*"))
    assert (cli.run_folder.path / "metrics.csv").is_file()
    assert [path.name for path in in_tmp.iterdir()] == ["runs"], "all of W&B's files are in the run folder"


def test_the_user_s_own_logger_and_callbacks(in_tmp):
    own = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=mine", "--trainer.callbacks+=EarlyStopping"]
    own += ["--trainer.callbacks.monitor=val/loss", "--trainer.callbacks+=ModelCheckpoint"]
    cli = run("fit", [*DIGITS, *own, "--trainer.callbacks.dirpath=kept"])
    assert [type(logger).__name__ for logger in cli.trainer.loggers] == ["CSVLogger"]
    assert (in_tmp / "mine").is_dir()
    assert list((in_tmp / "kept").glob("*.ckpt"))
    assert (cli.run_folder.path / "config.yaml").is_file()
    assert not (cli.run_folder.path / "checkpoints").exists()


def test_without_loggers_or_checkpoints(in_tmp):
    cli = run("fit", [*DIGITS, "--trainer.logger=false", "--trainer.enable_checkpointing=false"])
    assert cli.trainer.loggers == []
    assert cli.results["params"] > 0


def test_compare(in_tmp, capsys):
    assert main(["compare", *DIGITS, "--k", "4/3", "8/3", "--trainer.max_epochs=2"]) == 0
    (folder,) = (in_tmp / "runs" / "quickstart-compare").iterdir()
    with (folder / "comparison.csv").open() as file:
        plain, *slim = list(csv.DictReader(file))
    assert [row["network"].partition(" ")[2] for row in slim] == ["+ SlimConv2d k=4/3", "+ SlimConv2d k=8/3"]
    assert float(plain["macs / plain"]) == 1
    assert float(slim[1]["macs / plain"]) < float(slim[0]["macs / plain"]) < 1
    assert (folder / "curves.png").stat().st_size > 10_000
    said = capsys.readouterr().out
    assert "macs / plain" in said
    table = said[said.rindex("network ") :]
    assert table.count(" *") == 3
    assert table.count("\n* of a part of the data only: limit_train_batches=2\n") == 1
    assert plain["limited"] == slim[0]["limited"] != ""
    assert len(list(folder.glob("*/*/results.json"))) == 3


def test_compare_answers_mistakes_before_it_trains(in_tmp, capsys):
    assert main(["compare", *DIGITS, "--k", "1.9"]) == 2
    assert "nearest" in capsys.readouterr().err
    assert main(["compare", "--config=nope.yaml"]) == 2
    assert not (in_tmp / "runs").exists()


def test_tool_verbs(capsys):
    assert main(["models", "cifar_resnet20", "--format=csv"]) == 0
    assert "cifar_resnet20,275572,40556800" in capsys.readouterr().out
    assert main(["models", "resnet1[89]", "--format=csv"]) == 0
    assert "torchvision:resnet18,11689512" in capsys.readouterr().out
    assert main(["models", "rezzznet*"]) == 2
    assert "no network matches" in capsys.readouterr().err
    assert main(["profile", "cifar_resnet20", "--operator=SlimConv2d", "--operator.k=8/3", "--depth=0"]) == 0
    assert "SlimConv2d" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["fit", "--help"], ["fit", "--config=quickstart.yaml", "--print_config"]], ids=str)
def test_what_only_prints(words, capsys, in_tmp):
    assert main(words) == 0
    assert "max_epochs" in capsys.readouterr().out
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize("limit", ["1", "2", "0.5", "1.0"])
def test_a_limit_of_one_batch_is_not_all_of_them(limit, capsys, in_tmp):
    names = [f"limit_{part}_batches" for part in ("train", "val", "test", "predict")]
    words = [f"--trainer.{name}={limit}" for name in (*names, "overfit_batches")]
    assert main(["fit", "--config=quickstart.yaml", *words, "--print_config"]) == 0
    said = capsys.readouterr().out
    assert all(f" {name}: {limit}\n" in said for name in (*names, "overfit_batches"))


def test_processes_of_torchrun_share_one_run_folder(in_tmp):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m"]
    command = [*torchrun, "slimconv_lit", "fit", "--config=trainer/ddp.yaml", *DIGITS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (in_tmp / "runs" / "quickstart").iterdir()
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert len(done.stdout.split("cifar_resnet20 ")) == 2, "one process prints"


def test_faster_ways_to_compute_leave_checkpoints_as_they_are(in_tmp, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    options = ["--channels_last=true", "--compile=true", "--matmul_precision=high", "--test_after=false"]
    cli = run("fit", [*DIGITS, *SLIM, *options])
    assert compiled == ["CifarResNet"]
    assert cli.model.model.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    assert main(["test", "--ckpt_path=last", *SHORT]) == 0
