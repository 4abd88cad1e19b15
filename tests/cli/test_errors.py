"""A mistake gets one short answer with the closest accepted name, and exit status 2."""

import inspect
import subprocess
import sys

import pytest
from pytorch_lightning import Trainer

from slimconv_lit import ClassificationTask
from slimconv_lit.cli import main
from slimconv_lit.data import BaseDataModule
from slimconv_lit.lookup import check_keys
from slimconv_lit.tasks import BaseTask

MISTAKES = {
    "--trainer.max_epoch=3": "'--trainer.max_epoch' is not accepted; did you mean '--trainer.max_epochs'",
    "--model.lrr=0.1": "'--model.lrr' is not accepted; did you mean '--model.lr'?",
    # Names of other parts, such as the trainer's barebones, are not among the suggestions.
    "--model.backbon=x": "'--model.backbon' is not accepted; did you mean '--model.backbone'",
    "--model.optimzer=x": "'--model.optimzer' is not accepted; `--help` lists what is",
    "--model.operator.backbon=x": "'--model.operator.backbon' is not accepted; `--help` lists what is",
    "--model.batch_siz=4": "'--model.batch_siz' is not accepted; `--help` lists what is",
    "--model.batch_size=4": "'--model.batch_size' is not accepted; did you mean '--data.batch_size'?",
    "--data.max_epochs=4": "'--data.max_epochs' is not accepted; did you mean '--trainer.max_epochs'?",
    "--trainer.callbacks+=EarlyStopping --trainer.callbacks.patienc=3": "did you mean 'patience'?",
    "--data.batch_siz=4": "did you mean '--data.batch_size'",
    "--naem=x": "did you mean 'name'",
    "--optimizer.lr=1": "'--optimizer.lr' is not accepted",
    "--model.operator=SlimCnv2d": "model.operator: there is no class 'SlimCnv2d' that fits; did you mean 'SlimConv2d'",
    "--model.operator=SlimConv2d --model.operator.kk=2": "did you mean 'k'",
    "--model.operator.k=2": "it belongs to SlimConv2d, which must be named first",
    "--model.operator=SlimConv2d --model.operator.arrangement=flp": "there is no 'flp'; did you mean 'flip'",
    "--model.operator=SlimConv2d --model.operator.k=1.9": "nearest: 4/3 (n=2) or 2 (n=3)",
    "--model.operator=torch.nn.ReLU": "there is no class 'torch.nn.ReLU' that fits",
    "--model=Classification": "model: there is no class 'Classification' that fits; did you mean 'ClassificationTask'",
    "--model.backbone=cifar_resnet21": "backbone: there is no 'cifar_resnet21'; did you mean",
    "--data=DigitDataModule": "did you mean 'DigitsDataModule'",
    "--trainer.callbacks+=EarlyStoping": "did you mean 'EarlyStopping'",
    "--model.lr=abc": "model.lr: expected float, not 'abc'",
    "--model.schedule=cosin": "model.schedule: there is no 'cosin'; did you mean 'cosine'",
    "--trainer.max_epochs=three": "trainer.max_epochs: expected int, not 'three'",
    "--trainer.accelerator=gpuu": "invalid accelerator name",
    "--logger=wndb": "did you mean 'wandb'",
    "--kernel=tritn": "did you mean 'triton'",
    "--model.learning_rate=0.1": "'--model.learning_rate' is not accepted; did you mean '--model.lr'?",
    "--learning-rate=0.1": "'--learning-rate' is not accepted; did you mean '--model.lr'?",
    "--data.batchsize=4": "did you mean '--data.batch_size'",
    "--trainer.epochs=3": "'--trainer.epochs' is not accepted; did you mean '--trainer.max_epochs'?",
    "--gpus 2": "'--gpus' is not accepted; did you mean '--trainer.devices'?",
    "--model.arch=resnet50": "did you mean '--model.backbone'?",
    "--resume=x": "did you mean '--ckpt_path'?",
    "--ckpt_path=last": "--ckpt_path last: there is no",
    "--config=quikstart.yaml": "did you mean 'quickstart.yaml'",
    "--model.lr=-1": "error: lr=-1.0 must be at least 0\n",
    "--model.lr=.inf": "error: lr=inf must be at least 0, and finite",
    "--model.ema_decay=2": "ema_decay=2.0 must be from 0 to 1",
    "--model.momentum=0 --model.nesterov=true": "nesterov=True needs a momentum above 0",
    "--model.milestones=[3,2]": "milestones=[3.0, 2.0] must rise",
    "--model.label_smoothing=2": "label_smoothing=2.0 must be from 0 to 1",
    "--model.num_classes=7": "--model.num_classes is not to be set: the data say it",
    "--data.split_seed=-1": "split_seed=-1 must be from 0 to",
    "--data.num_workers=-1": "num_workers=-1 must be at least 0",
    "--data.eval_batch_size=0": "eval_batch_size=0 must be at least 1",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_on_the_command_line(words, in_tmp, capsys):
    assert main(["fit", "--config", "quickstart.yaml", *words.split()]) == 2
    answer = capsys.readouterr().err
    assert MISTAKES[words] in answer
    told = [line for line in answer.splitlines() if "Seed set" not in line]
    assert len(told) <= 3
    assert all(len(line) < 250 for line in told)
    assert not list(in_tmp.rglob("runs/*/*")), "a run that never began leaves no folder"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("trainer:\n  max_epoch: 3", "'trainer.max_epoch' is not accepted; did you mean 'trainer.max_epochs'"),
        ("return_predictions: false", "'return_predictions' is not accepted; `--help` lists what is\n"),
        ("modle:\n  class_path: ClassificationTask", "did you mean 'model'"),
        ("model:\n  init_args:\n    lrr: 3", "'lrr' is not accepted; did you mean 'lr'"),
        ("model:\n  init_args:\n    learning_rate: 3", "'learning_rate' is not accepted; did you mean '--model.lr'"),
        (
            "model:\n  init_args:\n    operator:\n      class_path: SlimConv2d\n      init_args:\n        k: 1.5",
            "error: k=1.5: n = 3k/2 = 2.25 folds is not a whole number of at least 2; nearest: 4/3 (n=2) or 2 (n=3)\n",
        ),
        ("model:\n  class_path: ClassificationTsk", "did you mean 'ClassificationTask'"),
    ],
)
def test_mistakes_in_a_file(text, answer, in_tmp, capsys):
    (in_tmp / "x.yaml").write_text(text)
    assert main(["fit", "--config", "quickstart.yaml", "--config", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert answer in said
    assert "JSONARGPARSE" not in said


SHORT = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
SHORT += ["--model.backbone=timm:test_resnet", "--trainer.enable_progress_bar=false", "--logger=csv"]
LATER = {
    "--trainer.max_epochs=-1": "max_epochs=-1, max_steps=-1; set trainer.max_epochs or trainer.max_steps",
    "--trainer.callbacks=Sparsity --trainer.callbacks.exclude=['*']": "Sparsity: exclude=['*'] leaves no batch norm",
    "--trainer.callbacks=EarlyStopping --trainer.callbacks.monitor=val/topp1": "metric `val/topp1` which is not",
    "--trainer.val_check_interval=1000": "`val_check_interval` (1000) must be less than or equal",
}


@pytest.mark.parametrize("words", LATER)
def test_mistakes_that_only_the_data_show(words, in_tmp, capsys):
    assert main(["fit", "--config=quickstart.yaml", *SHORT, *words.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert LATER[words] in line


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_a_mistake_in_the_program_keeps_its_traceback(kind, in_tmp, monkeypatch):
    def wrong(task, batch, batch_idx):
        raise kind("a mistake of ours")

    monkeypatch.setattr(ClassificationTask, "training_step", wrong)
    with pytest.raises(kind, match="a mistake of ours"):
        main(["fit", "--config=quickstart.yaml", *SHORT])


def test_what_is_missing(capsys):
    assert main(["fit"]) == 2
    assert "--config" in capsys.readouterr().err
    assert main(["test"]) == 2
    assert "test needs --ckpt_path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            ["compare", "--k", "2", "--config", "quikstart.yaml"],
            "--config: there is no 'quikstart.yaml'; did you mean 'quickst",
        ),
        (["fit", "-c", "nope.yaml"], "--config: there is no 'nope.yaml'; "),
        (["test", "--ckpt_path=x/y.ckpt"], "--ckpt_path: there is no file 'x/y.ckpt'; a file, `last` or `best`"),
        (
            ["fit", "--config=quickstart.yaml", "--model.lrr=1"],
            "'--model.lrr' is not accepted; did you mean '--model.lr'?",
        ),
    ],
    ids=str,
)
def test_slips_are_told_before_torch_is_loaded(words, answer, in_tmp):
    code = f"import sys; from slimconv_lit.cli import main; print(main({words}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith(f"error: {answer}")


def test_no_option_of_ours_is_taken_for_a_slip():
    families = {"model": BaseTask, "data": BaseDataModule}
    classes = [(part, cls) for part, root in families.items() for cls in [root, *root.__subclasses__()]]
    for part, cls in [*classes, ("trainer", Trainer)]:
        if cls.__module__.startswith(("slimconv_lit.", "pytorch_lightning.")):
            check_keys([f"--{part}.{name}=1" for name in inspect.signature(cls).parameters if name != "kwargs"])
    check_keys(["--model.operator.k=2", "--model.init_args.lr", "3", "--data.help", "--trainer.callbacks+=Timer"])
    check_keys(["--model.class_path=A", "--data.init_args={}", "--data.dict_kwargs.a=1", "--model.help=A"])


@pytest.mark.parametrize("verb", ["models", "profile"])
def test_mistakes_of_tool_verbs(verb, capsys):
    assert main([verb, "cifar_resnet21"]) == 2
    assert "'cifar_resnet21'" in capsys.readouterr().err
    assert main([verb, "cifar_resnet20", "--formt=md"]) == 2
    assert "did you mean 'format'" in capsys.readouterr().err


def test_the_traceback_of_a_constructor_is_to_be_had(monkeypatch, in_tmp):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="cifar_resnet21"):
        main(["fit", "--config", "quickstart.yaml", "--model.backbone=cifar_resnet21"])


def test_missing_files_are_named_without_a_traceback(in_tmp, capsys):
    assert main(["fit", "--config=cls_cifar100.yaml", "--data.download=false", "--data.root=nowhere"]) == 2
    said = capsys.readouterr().err
    assert "nowhere" in said
    assert "--data.sample=true" in said
    assert "Traceback" not in said
