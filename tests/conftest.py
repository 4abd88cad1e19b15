"""Tests never wait for a network, open a window, crowd the cores or write into the checkout."""

import os

# Before wandb and matplotlib are imported.
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# What passes today passes tomorrow; other inputs are for benchmarks/fuzz.py.
settings.register_profile("deterministic")
settings.load_profile("deterministic")


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """The folder that the test runs in, empty at first."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
