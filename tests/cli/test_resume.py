"""A fit that is broken off and resumed with `--ckpt_path last` is one that was never broken off, bit by bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kills
from slimconv_lit.callbacks import RunFolder
from slimconv_lit.cli import main
from slimconv_lit.lightning_cli import INTERRUPTED, TERMINATED

pytestmark = pytest.mark.usefixtures("few_pictures")

SHORT = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.max_epochs=2"]
SHORT += ["--trainer.limit_train_batches=6", "--trainer.limit_val_batches=2", "--test_after=false", "--logger=csv"]
SHORT += ["--model.backbone=timm:test_resnet", "--model.operator=null"]
DIGITS = ["--config=quickstart.yaml", *SHORT, "--data.batch_size=16", "--data.eval_batch_size=16"]
CIFAR = ["--config=cls_cifar100.yaml", *SHORT, "--data.sample=true", "--data.batch_size=8"]
SEGMENTATION = ["--config=seg_sample.yaml", *SHORT, "--data.batch_size=2", "--data.num_workers=1"]
DETECTION = ["--config=det_sample.yaml", *SHORT, "--model.min_size=64", "--model.max_size=96", "--data.batch_size=2"]
DETECTION += ["--data.num_workers=1", "--trainer.check_val_every_n_epoch=1"]
RANDOM = ["--model.mixup_alpha=0.2", "--model.cutmix_alpha=1", '--model.backbone_options={"drop_rate": 0.3}']
# Of 6 steps in each of 2 epochs, the batch that is not trained on any more; how often is saved; and what else is asked.
CASES = {
    "random": (DIGITS, 10, ["--save_every=4", *RANDOM]),
    "epoch_end": (DIGITS, 6, ["--data.num_workers=1", "--model.ema_decay=0.9"]),
    "accumulated": (DIGITS, 11, ["--trainer.accumulate_grad_batches=4", "--save_every=1"]),
    # The second validation is in the middle of a step.
    "validated_within_a_step": (
        DIGITS,
        9,
        ["--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=2", "--model.ema_decay=0.9"],
    ),
    "between_validations": (DIGITS, 9, ["--trainer.val_check_interval=2", "--save_every=1"]),
    "rare_validations": (DIGITS, 8, ["--trainer.check_val_every_n_epoch=2", "--save_every=3"]),
    "in_memory": (CIFAR, 10, ["--save_every=4"]),
    "segmentation": (SEGMENTATION, 10, ["--save_every=4", "--model.ema_decay=0.9"]),
    "detection": (DETECTION, 10, ["--save_every=4"]),
}


class Killed(BaseException):
    """Ends a fit at once, as a kill would: nothing of ours catches it."""


@pytest.fixture
def at(monkeypatch):
    """at(hook, count, act) has `act(trainer)` called when the run folder's `hook` is for the count-th time, from 0."""

    def install(hook, count, act):
        seen = []

        def called(callback, trainer, *_):
            seen.append(None)
            if len(seen) == count + 1 and not trainer.sanity_checking:
                act(trainer)

        monkeypatch.setattr(RunFolder, hook, called, raising=False)

    return install


def kill(trainer):
    raise Killed


def terminate(trainer):
    os.kill(os.getpid(), signal.SIGTERM)


def folder_of(name):
    (folder,) = Path("runs", name).iterdir()
    return folder


def assert_same(whole, broken):
    found = kills.contents(broken)
    for part, expected in kills.contents(whole).items():
        assert kills.same(expected, found[part]), part


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_fit_is_one_that_was_never_broken_off(case, in_tmp, data_root, at):
    words, batch, own = CASES[case]
    fit = ["fit", *words, *own, *([] if words is DIGITS else [f"--data.root={data_root}"])]
    assert main([*fit, "--name=whole"]) == 0
    at("on_train_batch_start", batch, kill)
    with pytest.raises(Killed):
        main([*fit, "--name=broken"])
    at("on_train_batch_start", -1, kill)
    assert main([*fit, "--name=broken", "--ckpt_path=last"]) == 0
    assert_same(folder_of("whole"), folder_of("broken"))


@pytest.mark.parametrize(
    ("hook", "count"),
    [
        ("on_train_batch_start", 7),
        # The last of an epoch.
        ("on_train_batch_start", 5),
        # Two of the sanity check, two of the first epoch, and the first of the second.
        ("on_validation_batch_start", 4),
    ],
)
def test_a_fit_that_is_told_to_end_saves_and_says_so_by_its_status(hook, count, averaged, in_tmp, at, capsys):
    fit = ["fit", *DIGITS, "--model.ema_decay=0.9"]
    at(hook, count, terminate)
    assert main(fit) == TERMINATED == 143
    assert "--ckpt_path last" in capsys.readouterr().out
    saved = torch.load(folder_of("quickstart") / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert saved == {7: 8, 5: 6, 4: 12}[count]
    at(hook, -1, terminate)
    assert main([*fit, "--ckpt_path=last"]) == 0
    assert_same(averaged, folder_of("quickstart"))


def test_an_interrupted_fit_says_how_to_go_on(in_tmp, at, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    fit = ["fit", *DIGITS]
    at("on_train_batch_start", 7, interrupt)
    before = signal.getsignal(signal.SIGINT)
    try:
        assert main(fit) == INTERRUPTED == 130
    finally:
        # Lightning turns a second one off while it ends.
        signal.signal(signal.SIGINT, before)
    assert "\ninterrupted; `fit --ckpt_path last` goes on" in capsys.readouterr().out
    at("on_train_batch_start", -1, interrupt)
    assert main([*fit, "--ckpt_path=last"]) == 0


def test_a_fit_that_is_told_to_end_within_a_step_makes_it_first(in_tmp, at):
    # Of 6 batches in each of 2 epochs, four make the first step and two the second.
    fit = ["fit", *DIGITS, "--trainer.accumulate_grad_batches=4", "--trainer.val_check_interval=2"]
    assert main([*fit, "--name=whole"]) == 0
    at("on_train_batch_start", 6, terminate)
    assert main([*fit, "--name=told"]) == TERMINATED
    saved = torch.load(folder_of("told") / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] == 4
    at("on_train_batch_start", -1, terminate)
    assert main([*fit, "--name=told", "--ckpt_path=last"]) == 0
    assert_same(folder_of("whole"), folder_of("told"))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """The folder of a fit that was not broken off."""
    root = tmp_path_factory.mktemp("averaged")
    assert main(["fit", *DIGITS, "--model.ema_decay=0.9", f"--run_root={root}"]) == 0
    (folder,) = (root / "quickstart").iterdir()
    return folder


def test_the_best_epoch_before_a_break_is_still_the_best(in_tmp, at, recwarn):
    # Nothing is learned, so no epoch is better than the first.
    fit = ["fit", *DIGITS, "--model.lr=1", "--model.warmup_epochs=0", "--trainer.limit_val_batches=1.0", "--name=x"]
    at("on_train_batch_start", 7, kill)
    with pytest.raises(Killed):
        main(fit)
    folder = folder_of("x")
    best = folder / "checkpoints" / "best.ckpt"
    before = best.read_bytes()
    # Also where the folder has been moved meanwhile.
    folder.rename(folder.with_name("moved"))
    at("on_train_batch_start", -1, kill)
    assert main([*fit, "--ckpt_path=last"]) == 0
    best = Path("runs", "x", "moved", "checkpoints", "best.ckpt")
    assert best.read_bytes() == before
    assert {path.name for path in best.parent.iterdir()} == {"best.ckpt", "last.ckpt"}
    assert not [w for w in recwarn if "dirpath has changed" in str(w.message)]


@pytest.mark.parametrize("harm", ["truncated", "changed", "empty"])
def test_a_damaged_checkpoint_is_told_in_one_line_that_names_a_whole_one(harm, in_tmp, finished, capsys):
    last = finished / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    middle = len(content) // 2
    harmed = {
        "truncated": content[:middle],
        "changed": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
    }[harm]
    try:
        last.write_bytes(harmed)
        for verb in ("fit", "test"):
            assert main([verb, f"--ckpt_path={last}"]) == 2
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
            assert line == (
                f"error: {last} is truncated or damaged, or no checkpoint; the newest that is whole is "
                f"{last.with_name('best.ckpt')}"
            )
    finally:
        last.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished fit of one epoch."""
    root = tmp_path_factory.mktemp("finished")
    assert main(["fit", *DIGITS, "--trainer.max_epochs=1", f"--run_root={root}"]) == 0
    (folder,) = (root / "quickstart").iterdir()
    return folder


def test_killed_at_random_moments():
    # A process of its own: forks of this one would inherit what other tests have left of their workers.
    command = [sys.executable, kills.__file__, "--kills=2", "--seed=1", "--logger=csv"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
