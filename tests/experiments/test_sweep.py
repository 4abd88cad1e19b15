"""Sweeps that run: points, failures, and a kill in the middle."""

import csv
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from slimconv_lit.cli import main
from slimconv_lit.experiments.sweep_file import read_sweep
from slimconv_lit.lookup import CONFIGS

TINY = """
method: grid
metric: {name: test/top1, goal: maximize}
parameters:
  model.operator.k:
    values: %s
command: [python, -m, slimconv_lit, fit, --config, quickstart.yaml, --model.operator=SlimConv2d, "${args}"]
"""
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.accelerator=cpu"]


def write(folder, ks):
    (folder / "tiny.yaml").write_text(TINY.replace("python", '"${interpreter}"', 1) % json.dumps(ks))


def rows_of(root):
    with (root / "tiny" / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def start(root, arguments):
    os.chdir(root)
    main(["sweep", "tiny.yaml", *SHORT, *arguments])


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def test_a_killed_sweep_goes_on_to_the_same_table(in_tmp):
    write(in_tmp, ["4/3", "8/3", "4"])
    assert main(["sweep", "tiny.yaml", *SHORT, "--run_root=whole"]) == 0
    process = multiprocessing.get_context("forkserver").Process(target=start, args=(in_tmp, ["--run_root=part"]))
    process.start()
    part = Path("part/tiny")
    # One point is done, the next under way.
    wait_for(lambda: list(part.glob("*/point.json")) and len(list(part.glob("*/output.txt"))) > 1)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = {path: path.stat().st_mtime_ns for path in part.glob("*/point.json")}
    assert 0 < len(done) < 3
    assert main(["sweep", "tiny.yaml", *SHORT, "--run_root=part"]) == 0
    assert (part / "sweep.csv").read_bytes() == Path("whole/tiny/sweep.csv").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in done} == done, "what was finished is not run again"
    rows = rows_of(Path("part"))
    assert [row["model.operator.k"] for row in rows] == ["4/3", "8/3", "4"]
    assert {row["status"] for row in rows} == {"finished"}
    assert 0 < float(rows[0]["compressed %"]) < float(rows[1]["compressed %"]) < float(rows[2]["compressed %"])
    with Image.open(part / "sweep.png") as picture:
        assert min(picture.size) > 400


def test_a_point_that_fails_says_why_and_the_others_go_on(in_tmp, monkeypatch, capsys):
    write(in_tmp, ["1.9", "8/3"])
    assert main(["sweep", "tiny.yaml", *SHORT]) == 1
    failed, finished = rows_of(Path("runs"))
    assert "nearest" in failed["status"]
    assert finished["status"] == "finished"
    # Another command is another point.
    before = sorted(Path("runs/tiny").glob("*/*/results.json"))
    monkeypatch.syspath_prepend(in_tmp)
    (in_tmp / "of_the_points.py").write_text("import pytorch_lightning as pl\nclass Mine(pl.Callback): pass\n")
    mine = ["--trainer.callbacks=of_the_points.Mine", "--allow-import=of_the_points"]
    assert main(["sweep", "tiny.yaml", *SHORT, "--model.lr=0.01", *mine]) == 1
    assert rows_of(Path("runs"))[1]["status"] == "finished", "what is let in is let into the points' processes too"
    # The same words, and another recipe behind them, of which there are no results.
    (in_tmp / "quickstart.yaml").write_text(f"base: {CONFIGS / 'quickstart.yaml'}\ntest_after: false\n")
    assert main(["sweep", "tiny.yaml", *SHORT, "--model.lr=0.01", *mine]) == 1
    assert rows_of(Path("runs"))[1]["status"] == "failed: it was not tested, so it has no results.json"
    assert len(list(Path("runs/tiny").glob("*/*/results.json"))) == len(before) + 1


def test_a_dry_run_counts_and_runs_nothing(in_tmp, capsys):
    write(in_tmp, ["8/3", "1.9"])
    assert main(["sweep", "tiny.yaml", *SHORT, "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "python -m slimconv_lit fit --config quickstart.yaml" in printed
    assert "--model.operator.k=8/3" in printed
    assert "57,744" in printed
    assert "cannot be built" in printed
    assert not Path("runs").exists()


def test_mistakes_are_answered_at_once(in_tmp, capsys):
    assert main(["sweep", "nothing.yaml"]) == 2
    assert "there is no file 'nothing.yaml'" in capsys.readouterr().err
    write(in_tmp, ["2"])
    text = Path("tiny.yaml").read_text()
    Path("tiny.yaml").write_text(text.replace("values", "vlaues"))
    assert main(["sweep", "tiny.yaml"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_two_sweeps_do_not_share_a_folder(in_tmp, capsys):
    fcntl = pytest.importorskip("fcntl")
    write(in_tmp, ["2"])
    folder = Path("runs", read_sweep(Path("tiny.yaml")).path.stem)
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["sweep", "tiny.yaml", *SHORT]) == 2
    assert "another process is running this sweep" in capsys.readouterr().err
