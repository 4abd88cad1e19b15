"""What several tests of the command line share."""

import pytest

from slimconv_lit.callbacks import Visualize


@pytest.fixture
def few_pictures(monkeypatch):
    """Validations draw one picture: drawing all of them takes longer than so short a fit."""
    monkeypatch.setattr(Visualize.__init__, "__defaults__", (1, 10))
