"""The corpus of benchmarks/fuzz.py, and a short run of it: every reader takes an input or refuses it cleanly."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import READERS, answer, inputs_of, mutate

# Each goes through the whole parser of a verb.
SLOW = {"config": 20, "command_line": 20, "prune_section": 50}


@pytest.fixture(scope="module", params=READERS)
def reader(request, tmp_path_factory):
    """(name, reader), in a folder that is ready for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp(request.param))
        READERS[request.param].prepare()
        yield request.param, READERS[request.param]


def test_what_once_failed_is_refused_cleanly(reader):
    name, reader = reader
    for content in inputs_of(name):
        _, trouble = answer(reader, content)
        assert not trouble, f"{content[:200]!r}\n{trouble}"


def test_changed_inputs_are_refused_cleanly(reader):
    name, reader = reader
    corpus = inputs_of(name)

    # The same ones each time: benchmarks/fuzz.py is there to find others.
    @settings(
        max_examples=SLOW.get(name, 150),
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(corpus), st.integers(0, 2**32))
    def run(content, seed):
        changed = mutate(content, corpus, random.Random(seed))
        _, trouble = answer(reader, changed)
        assert not trouble, f"{changed[:200]!r}\n{trouble}"

    run()
