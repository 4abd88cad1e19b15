"""What goes wrong on real machines, caused for real: each ends as promised and leaves a run that can go on."""

import contextlib
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import wandb
from PIL import Image

from slimconv_lit.callbacks import RunFolder
from slimconv_lit.callbacks.run_folder import Lock
from slimconv_lit.cli import main

pytestmark = pytest.mark.usefixtures("few_pictures")

QUIET = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--test_after=false"]
DIGITS = ["fit", "--config=quickstart.yaml", *QUIET, "--data.batch_size=16", "--trainer.limit_train_batches=6"]
DIGITS += ["--model.backbone=timm:test_resnet"]
DIGITS += ["--trainer.limit_val_batches=1", "--trainer.max_epochs=2", "--save_every=2", "--logger=csv"]
CLASSES, EACH = ("cat", "dog"), 24
PHOTOS = ["fit", "--config=cls_imagenet.yaml", *QUIET, "--data.root=photos", "--data.image_size=32"]
PHOTOS += ["--model.backbone=timm:test_resnet", "--model.operator=null", "--data.batch_size=4", "--data.num_workers=1"]
PHOTOS += ["--trainer.max_epochs=1", "--save_every=2", "--logger=csv"]
# A fault that is made before step 3 may be met later, for a worker has read ahead.
AHEAD = [2, 4, 6]


@pytest.fixture(autouse=True)
def in_time():
    """No fault may take longer than this to be told."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 60


@pytest.fixture
def photos(in_tmp):
    """ImageNet's layout, of 48 and 8 pictures."""
    for part, count in (("train", EACH), ("val", 4)):
        for colour, name in enumerate(CLASSES):
            folder = in_tmp / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (40, 40), (number * 10, colour * 200, 50)).save(folder / f"{number:02d}.png")
    return in_tmp / "photos"


@pytest.fixture
def at_step(monkeypatch):
    """at_step(number, act) has `act(trainer, batch)` called before that batch of the fit, counted from 0."""

    def install(number, act):
        def called(callback, trainer, module, batch, batch_idx):
            if trainer.fit_loop.total_batch_idx == number:
                act(trainer, batch)

        monkeypatch.setattr(RunFolder, "on_train_batch_start", called, raising=False)

    return install


def error_of(capsys):
    """The one line that is told of an error."""
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
    return line


def run_folder(name="quickstart"):
    (folder,) = Path("runs", name).iterdir()
    return folder


def assert_goes_on(words, steps):
    """The last checkpoint is of one of these steps, and the run ends when it is resumed."""
    folder = run_folder(Path(next(w for w in words if w.startswith("--config=")).partition("=")[2]).stem)
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] in steps
    assert not list(folder.rglob("*.partial"))
    assert main([*words, "--ckpt_path=last"]) == 0
    assert main(["test", "--ckpt_path=last", *[w for w in words if w.startswith(("--data", "--trainer.acc"))]]) == 0


def test_a_full_disk(in_tmp, at_step, capsys):
    disk = in_tmp / "runs"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    filler = disk / "filler"

    def fill(trainer, batch):
        # Until there is no space left.
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**16))

    try:
        at_step(7, fill)
        assert main(DIGITS) == 2
        line = error_of(capsys)
        assert "last.ckpt cannot be written: No space left on device (0 MiB free)" in line
        assert line.endswith("checkpoints/last.ckpt, which is whole")
        filler.unlink()
        at_step(-1, fill)
        assert_goes_on(DIGITS, [6])
    finally:
        subprocess.run(["umount", disk], check=True)


# Behind the first validation, and at the very end.
@pytest.mark.parametrize(("name", "step"), [("pictures/validation.png", 4), ("results.json.partial", 12)])
def test_a_full_disk_where_no_checkpoint_is_written(name, step, in_tmp, at_step, capsys):
    def fill(trainer, batch):
        path = run_folder() / name
        path.parent.mkdir(exist_ok=True)
        path.symlink_to("/dev/full")

    at_step(5, fill)
    assert main([*DIGITS, "--test_after=true"]) == 2
    assert "No space left on device" in error_of(capsys)
    (run_folder() / name).unlink(missing_ok=True)
    at_step(-1, fill)
    assert_goes_on(DIGITS, [step])


def test_a_data_folder_that_vanishes(photos, at_step, capsys):
    gone = photos.with_name("gone")
    at_step(3, lambda trainer, batch: (photos / "train").rename(gone))
    assert main(PHOTOS) == 2
    assert f"No such file or directory: '{Path('photos', 'train')}" in error_of(capsys)
    gone.rename(photos / "train")
    at_step(-1, None)
    assert_goes_on(PHOTOS, AHEAD)


def test_a_process_that_loads_images_is_killed(photos, at_step, capsys):
    def strike(trainer, batch):
        os.kill(trainer.train_dataloader._iterator._workers[0].pid, signal.SIGKILL)

    at_step(3, strike)
    assert main(PHOTOS) == 2
    line = error_of(capsys)
    assert "is killed by signal: Killed" in line or "exited unexpectedly" in line
    assert "lower --data.num_workers or --data.batch_size" in line
    at_step(-1, None)
    assert_goes_on(PHOTOS, AHEAD)


def test_a_broken_picture_is_named(photos, capsys):
    (photos / "train" / "dog" / "07.png").write_bytes(b"no picture")
    assert main(PHOTOS) == 2
    assert error_of(capsys).startswith("error: photos/train/dog/07.png cannot be decoded")


def test_a_broken_picture_is_passed_over_where_that_is_wanted(photos, recwarn):
    (photos / "train" / "dog" / "07.png").write_bytes(b"no picture")
    (photos / "val" / "cat" / "01.png").write_bytes(b"no picture")
    # One by one, so that a batch is empty.
    assert main([*PHOTOS, "--data.on_bad_image=skip", "--data.eval_batch_size=1"]) == 0
    told = (run_folder("cls_imagenet") / "left_out.txt").read_text().splitlines()
    assert sorted(line.partition(" ")[0] for line in told) == ["photos/train/dog/07.png", "photos/val/cat/01.png"]
    warned = [str(w.message) for w in recwarn if "left out, 1 of 48 so far" in str(w.message)]
    assert len(warned) == 1


def test_too_many_broken_pictures(photos, capsys):
    for number in range(2):
        (photos / "train" / "dog" / f"{number:02d}.png").write_bytes(b"no picture")
    assert main([*PHOTOS, "--data.on_bad_image=skip"]) == 2
    assert "2 of 48 pictures cannot be read, and on_bad_image=skip passes over 1% at most" in error_of(capsys)


def test_a_prediction_goes_on_without_broken_pictures(in_tmp):
    assert main([*DIGITS, "--trainer.max_epochs=1"]) == 0
    (in_tmp / "photos").mkdir()
    for number in range(4):
        Image.new("L", (20, 20), 60 * number).save(in_tmp / "photos" / f"{number}.png")
    for number in (1, 3):
        (in_tmp / "photos" / f"{number}.png").write_bytes(b"no picture")
    words = ["--ckpt_path=last", "--data=photos", "--data.on_bad_image=skip", "--data.eval_batch_size=2"]
    assert main(["predict", *words]) == 0
    (folder,) = Path("runs", "quickstart").glob("*-predict")
    assert [row.partition(",")[0] for row in (folder / "predictions.csv").read_text().split()] == [
        "name",
        "0.png",
        "2.png",
    ]
    told = (folder / "left_out.txt").read_text().splitlines()
    assert [line.partition(" ")[0] for line in told] == ["photos/1.png", "photos/3.png"]


def poison(trainer, batch):
    batch[0].fill_(float("nan"))


def test_a_loss_that_is_not_finite(in_tmp, at_step, capsys):
    at_step(7, poison)
    assert main(DIGITS) == 2
    line = error_of(capsys)
    assert "the loss is nan in batch 1 of epoch 1" in line
    told = json.loads((run_folder() / "bad_batches.jsonl").read_text())
    assert (told["epoch"], told["batch"], len(told["samples"])) == (1, 1, 16)
    at_step(-1, poison)
    assert_goes_on(DIGITS, [6])


def test_the_files_of_a_batch_whose_loss_is_not_finite(photos, at_step, capsys):
    at_step(3, poison)
    assert main(PHOTOS) == 2
    samples = json.loads((run_folder("cls_imagenet") / "bad_batches.jsonl").read_text())["samples"]
    assert len({sample["file"] for sample in samples}) == 4
    assert all(Path(sample["file"]).is_file() for sample in samples)
    # The same images, in shards.
    assert main(["prepare", f"--data.root={photos}", "--output=shards"]) == 0
    assert main([*PHOTOS, "--data.root=shards", "--name=shards"]) == 2
    packed = json.loads((run_folder("shards") / "bad_batches.jsonl").read_text())["samples"]
    assert [Path(sample["file"]).parts[-2:] for sample in packed] == [Path(s["file"]).parts[-2:] for s in samples]


# The first of two batches whose gradients make one step, validated before that.
@pytest.mark.parametrize("how", [[], ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=3"]])
def test_a_loss_that_is_not_finite_is_let_go_by_where_that_is_wanted(how, in_tmp, at_step):
    at_step(2, poison)
    assert main([*DIGITS, "--on_bad_loss=skip", *how]) == 0
    state = torch.load(run_folder() / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
    rows = csv.DictReader((run_folder() / "metrics.csv").open())
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert len(losses) == (4 if how else 2)
    assert all(map(math.isfinite, losses))


def test_too_many_losses_that_are_not_finite(in_tmp, capsys):
    assert main([*DIGITS, "--on_bad_loss=skip", "--model.lr=1e30"]) == 2
    assert "It is number 2 in this epoch, and --on_bad_loss=skip lets 1% go by" in error_of(capsys)


def test_a_logger_that_fails(in_tmp, at_step, recwarn):
    def harm(trainer, batch):
        (run_folder() / "metrics.csv").unlink(missing_ok=True)
        (run_folder() / "metrics.csv").mkdir()

    at_step(3, harm)
    assert main(DIGITS) == 0
    (told,) = warnings_of_failed(recwarn)
    assert told.startswith("MetricsFile has failed and is left out from here on; training goes on. IsADirectoryError")


def warnings_of_failed(recwarn):
    return [str(w.message) for w in recwarn if "has failed" in str(w.message)]


def rows_of_metrics():
    return len((run_folder() / "metrics.csv").read_text().splitlines())


def test_the_process_of_wandb_is_killed(in_tmp, at_step, recwarn, capfd):
    def strike(trainer, batch):
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        (core,) = [pid for pid in children if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(int(core), signal.SIGKILL)

    at_step(3, strike)
    fit = [*DIGITS, "--logger=wandb", "--trainer.log_every_n_steps=1"]
    assert main(fit) == 0
    (told,) = warnings_of_failed(recwarn)
    assert told.startswith("Wandb has failed and is left out from here on; training goes on. ConnectionResetError")
    # A line of names, one for each of 12 steps, two validations.
    assert rows_of_metrics() == 15
    assert "Traceback" not in capfd.readouterr().err
    # The next run of this process has a W&B again.
    at_step(-1, strike)
    assert main([*fit, "--name=next", "--trainer.max_epochs=1"]) == 0
    assert len(warnings_of_failed(recwarn)) == 1
    assert list(run_folder("next").glob("wandb/offline-run-*/*.wandb"))


def test_wandb_does_not_begin(in_tmp, monkeypatch, recwarn):
    # So that it looks at the environment again.
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "too short")
    assert main([*DIGITS, "--logger=wandb"]) == 0
    (told,) = warnings_of_failed(recwarn)
    assert "WANDB_API_KEY invalid" in told
    assert (run_folder() / "checkpoints" / "last.ckpt").exists()
    wandb.teardown()


def test_memory_that_is_not_there(in_tmp, at_step, capsys):
    at_step(3, lambda trainer, batch: torch.empty(2**50))
    assert main(DIGITS) == 2
    line = error_of(capsys)
    assert "out of memory with 16 images of 1 x 16 x 16 at a time (--data.batch_size)" in line
    assert "Lower the batch size" in line
    at_step(-1, None)
    assert_goes_on(DIGITS, [2])


def test_memory_that_is_not_there_for_the_data(in_tmp, capsys):
    assert main([*DIGITS, "--data.image_size=1000000"]) == 2
    assert "out of memory with 16 images of 1 x 1000000 x 1000000" in error_of(capsys)
    assert not list(in_tmp.glob("runs/*/*")), "a run that never began leaves no folder"


def test_a_folder_of_runs_that_cannot_be_written_to(in_tmp, capsys):
    (in_tmp / "runs").write_text("a file in the folder's place")
    assert main(DIGITS) == 2
    assert error_of(capsys) == "error: --run_root=runs: cannot write into runs/quickstart: Not a directory"


def test_a_disk_that_cannot_be_written_to(in_tmp, capsys):
    disk = in_tmp / "runs"
    disk.mkdir()
    assert main([*DIGITS, "--trainer.max_epochs=1"]) == 0
    if subprocess.run(["mount", "--bind", "-o", "ro", disk, disk], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        for more in ([], ["--ckpt_path=last"]):
            assert main([*DIGITS, *more]) == 2
            assert error_of(capsys).endswith("cannot write into runs/quickstart: Read-only file system")
    finally:
        subprocess.run(["umount", disk], check=True)
    assert_goes_on(DIGITS, [6])


@contextlib.contextmanager
def another_process(lock):
    """Another process that has opened a lock, and holds it as soon as it can; it says a line at each."""
    code = "import fcntl, os, sys; f = open(sys.argv[1], 'a+'); print(flush=True); fcntl.lockf(f, fcntl.LOCK_EX)"
    code += "; f.truncate(0); f.write(str(os.getpid())); f.flush(); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        yield other
        other.stdin.close()


def test_a_second_process_in_the_same_run(in_tmp, capsys):
    assert main([*DIGITS, "--trainer.max_epochs=1"]) == 0
    with another_process(run_folder() / ".lock") as other:
        other.stdout.readline()
        assert main([*DIGITS, "--ckpt_path=last"]) == 2
        assert f"process {other.pid} is writing into {run_folder()}" in error_of(capsys)
    assert main([*DIGITS, "--ckpt_path=last"]) == 0


def test_a_second_process_in_the_same_pruning(in_tmp, capsys):
    folder = Path("runs", "x")
    folder.mkdir(parents=True)
    with another_process(folder / ".lock") as other:
        other.stdout.readline()
        assert main(["prune", "--config=quickstart.yaml", "--name=x", *QUIET[:2]]) == 2
        assert f"process {other.pid} is writing into runs/x" in error_of(capsys)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_who_lets_go_of_a_lock_leaves_it_to_who_waits(in_tmp):
    mine = Lock(in_tmp)
    with another_process(in_tmp / ".lock") as other:
        mine.release()
        other.stdout.readline()
        with pytest.raises(BlockingIOError):
            Lock(in_tmp)


def test_a_resume_that_fails_leaves_what_it_found(in_tmp, capsys):
    assert main([*DIGITS, "--trainer.max_epochs=1"]) == 0
    # As a folder looks of which the checkpoints alone were copied.
    moved = in_tmp / "runs" / "moved" / "2026-01-01_00-00-00" / "checkpoints"
    shutil.copytree(run_folder() / "checkpoints", moved)
    before = {path: path.stat().st_size for path in moved.iterdir()}
    words = [f"--ckpt_path={moved / 'last.ckpt'}", "--name=moved", "--data=CIFAR100DataModule", "--data.root=nowhere"]
    assert main(["fit", "--config=quickstart.yaml", *QUIET, *words]) == 2
    assert "nowhere" in error_of(capsys)
    assert {path: path.stat().st_size for path in moved.iterdir()} == before
