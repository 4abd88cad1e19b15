from concurrent.futures import ThreadPoolExecutor

import pytest
from pytorch_lightning.utilities import rank_zero_only

from slimconv_lit.callbacks.loggers import make_loggers
from slimconv_lit.callbacks.run_folder import new_run_folder


def test_no_two_runs_share_a_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_run_folder(tmp_path, "x"), range(32)))
    assert len(set(folders)) == 32
    assert all(folder.is_dir() for folder in folders)


def test_other_verbs_are_told_apart(tmp_path):
    assert new_run_folder(tmp_path, "x", "predict").name.endswith("-predict")


def test_only_the_first_process_makes_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    new_run_folder(tmp_path, "x")
    assert list(tmp_path.iterdir()) == []


def test_metrics_csv_is_always_there(tmp_path):
    assert [type(logger).__name__ for logger in make_loggers("", tmp_path)] == ["MetricsFile"]
    names = [type(logger).__name__ for logger in make_loggers("csv, tensorboard", tmp_path)]
    assert names == ["TensorBoardLogger", "MetricsFile"]
    with pytest.raises(ValueError, match="did you mean 'tensorboard'"):
        make_loggers("tensorbord", tmp_path)
