"""Sweep files: those of the checkout as W&B's agent runs them, and mistakes in others."""

import shutil

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from slimconv_lit.experiments.sweep_file import find_sweep, read_sweep
from slimconv_lit.lightning_cli import preview
from slimconv_lit.lookup import CONFIGS

SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
GOOD = {
    "method": "grid",
    "metric": {"name": "test/top1", "goal": "maximize"},
    "parameters": {"model.operator.k": {"values": ["4/3", 2]}, "model.lr": {"value": 0.1}},
    "command": ["${env}", "${interpreter}", "-m", "slimconv_lit", "fit", "--config", "quickstart.yaml", "${args}"],
}

LOG = {"distribution": "log_uniform_values", "min": 0.1, "max": 1}


def write(folder, **changes):
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (GOOD | changes).items() if v is not None}))
    return path


def agent_words(values, point):
    """The command line as W&B's own agent builds it, behind the verb."""
    arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in point.items()}})
    words = []
    for chunk in create_sweep_command(list(values["command"])):
        words += arguments["args"] if chunk == "${args}" else [chunk]
    return words[words.index("fit") + 1 :]


def some_points(sweep):
    # W&B's server chooses the points of a Bayesian search from the same distributions.
    method = "grid" if sweep.method == "grid" else "random"
    points = read_sweep(sweep.path).__class__(**{**vars(sweep), "method": method}).points()
    return [points[0], points[-1]]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_what_the_agent_would_type_is_understood(path, in_tmp):
    values = yaml.safe_load(path.read_text())
    sweep = read_sweep(path)
    networks = set()
    for point in some_points(sweep):
        words = agent_words(values, point)
        assert words == [*sweep.options, *sweep.arguments(point)]
        networks.add(str(preview(words)))
    assert path.read_text().startswith(("# python -m slimconv_lit sweep " + path.name, "# wandb sweep configs/sweeps/"))
    if sweep.method == "grid" and {"model.operator", "model.operator.k"} & set(sweep.parameters):
        assert len(networks) == 2


@pytest.mark.parametrize("value", ["null", True, False, 2, 0.1, "8/3", [1, 2]])
def test_arguments_are_those_of_the_agent(value, tmp_path):
    point = {"model.x": value, "seed_everything": 1}
    assert read_sweep(write(tmp_path)).arguments(point) == agent_words(GOOD, point)[2:]


def test_points_of_a_grid_and_of_a_search(tmp_path):
    axes = {"a": {"values": [1, 2]}, "b": {"min": 3, "max": 5}, "c": {"value": "x"}}
    grid = read_sweep(write(tmp_path, parameters=axes)).points()
    assert [(p["a"], p["b"], p["c"]) for p in grid] == [(a, b, "x") for a in (1, 2) for b in (3, 4, 5)]
    search = read_sweep(write(tmp_path, parameters=axes, method="random", run_cap=5))
    assert len(search.points()) == 5
    # A longer search begins with the same points.
    assert search.points(9)[:5] == search.points()


@given(
    st.sampled_from(["uniform", "q_uniform", "log_uniform_values", "inv_log_uniform_values", "int_uniform"]), st.data()
)
def test_draws_lie_in_their_range(tmp_path_factory, kind, data):
    low = data.draw(st.integers(1, 50))
    high = low + data.draw(st.integers(0, 50))
    rule = {"distribution": kind, "min": low, "max": high, "q": 1}
    path = write(tmp_path_factory.mktemp("sweep"), method="random", run_cap=20, parameters={"a": rule})
    drawn = [point["a"] for point in read_sweep(path).points()]
    assert all(low - 1e-9 <= value <= high + 1e-9 for value in drawn)
    if kind in ("q_uniform", "int_uniform"):
        assert all(value == int(value) for value in drawn)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metod": "grid"}, "no key 'metod'; did you mean 'method'"),
        ({"method": "gird"}, "no 'gird'; did you mean 'grid'"),
        ({"metric": {"name": "test/top1"}}, "a goal, maximize or minimize"),
        ({"parameters": {}}, "parameters: expected"),
        ({"parameters": {"a": {"vlaues": [1]}}}, r"parameters.a: there is no key 'vlaues'; did you mean .*'values'"),
        ({"parameters": {"a": {"values": [None, 1]}}}, 'parameters.a: .* write "null", quoted'),
        ({"parameters": {"a": {"values": []}}}, "parameters.a.values: expected a list"),
        ({"parameters": {"a": {"parameters": {}}}}, "parameters.a: .*dotted names"),
        ({"parameters": {"a": {"min": 1}}}, "parameters.a: expected `value`, `values`, or max and min"),
        ({"parameters": {"a": {"distribution": "unifrom"}}}, "no 'unifrom'; did you mean 'uniform'"),
        ({"parameters": {"a": 3}}, "parameters.a: expected `value`"),
        *(
            ({"parameters": {"a": rule}}, message)
            for rule, message in (
                (LOG | {"min": 0}, "parameters.a.min: expected more than 0 for log_uniform_values, found 0"),
                (LOG | {"min": -1}, "parameters.a.min: expected more than 0 for log_uniform_values, found -1"),
                (LOG | {"max": 0.01}, "parameters.a.max: expected at least the min of 0.1, found 0.01"),
                ({"min": 3, "max": 2}, "parameters.a.max: expected at least the min of 3, found 2"),
                (
                    {"distribution": "int_uniform", "min": 0.5, "max": 2},
                    r"parameters.a.min: expected a whole number for int_uniform, found 0\.5",
                ),
                (
                    {"distribution": "normal", "mu": 0, "sigma": -1},
                    "parameters.a.sigma: expected 0 or more for normal, found -1",
                ),
                (
                    {"distribution": "q_uniform", "min": 0, "max": 2, "q": 0},
                    "parameters.a.q: expected more than 0 for q_uniform, found 0",
                ),
                *(
                    (
                        {"values": [1, 2], "probabilities": parts},
                        "parameters.a.probabilities: .* each of `values`, 1 in",
                    )
                    for parts in ([1], [0.5, 0.6], [-1, 2], "x", 1)
                ),
            )
        ),
        ({"metric": {"name": 3, "goal": "maximize"}}, "metric needs a name"),
        ({"command": ["python", "train.py", "${args}"]}, "must run `python -m slimconv_lit fit`"),
        ({"command": None}, r"a list with \$\{args\}"),
        ({"command": [*GOOD["command"], "${args_json}"]}, r"\$\{args_json\} is not understood"),
    ],
    ids=str,
)
def test_mistakes_name_the_file_and_the_way_out(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read_sweep(write(tmp_path, **changes))
    assert str(error.value).startswith(str(tmp_path / "sweep.yaml"))


def test_searches_that_cannot_run_here(tmp_path):
    with pytest.raises(ValueError, match=r"`wandb sweep .*or say `method: random`"):
        read_sweep(write(tmp_path, method="bayes")).points()
    with pytest.raises(ValueError, match="needs --count, or `run_cap`"):
        read_sweep(write(tmp_path, method="random")).points()
    with pytest.raises(ValueError, match=r"parameters.a: a grid needs `values`"):
        read_sweep(write(tmp_path, parameters={"a": {"min": 0.1, "max": 0.2}})).points()
    path = tmp_path / "text.yaml"
    path.write_text("a: [")
    with pytest.raises(ValueError, match=r"text.yaml: not YAML"):
        read_sweep(path)


def test_finding_a_file(in_tmp):
    assert find_sweep("k_digits") == find_sweep("configs/sweeps/k_digits.yaml") == CONFIGS / "sweeps" / "k_digits.yaml"
    with pytest.raises(FileNotFoundError, match=r"'k_digit.yaml'; did you mean 'k_digits.yaml'"):
        find_sweep("k_digit.yaml")
    shutil.copy(CONFIGS / "sweeps" / "k_digits.yaml", in_tmp / "k_digits.yaml")
    assert find_sweep("k_digits.yaml").resolve() == in_tmp / "k_digits.yaml"
