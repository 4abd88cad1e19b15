"""Tests never wait for a network, open a window, crowd the cores or write into the checkout."""

import os

# Before wandb and matplotlib are imported.
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """The folder that the test runs in, empty at first."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
