"""W&B sweep files, read without W&B: the points of a grid or random search, and the command of each.

The same file goes to `wandb sweep`; see https://docs.wandb.ai/models/sweeps/sweep-config-keys for what its keys mean.
"""

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml  # type: ignore[import-untyped]

from slimconv_lit.config_files import read_yaml
from slimconv_lit.lookup import CONFIGS, closest
from slimconv_lit.trust import OPTION, asks_for_imports

Point: TypeAlias = dict[str, Any]
"""One value for each parameter of a sweep, keyed by its dotted name."""

KEYS = {
    *("program", "method", "parameters", "command", "metric", "run_cap", "early_terminate"),
    *("name", "description", "entity", "project", "imports"),
}
METHODS = ("grid", "random", "bayes")
PARAMETER_KEYS = {"value", "values", "probabilities", "distribution", "min", "max", "mu", "sigma", "q", "parameters"}
DISTRIBUTIONS = (
    *("constant", "categorical", "int_uniform", "uniform", "q_uniform", "log_uniform_values", "q_log_uniform_values"),
    *("inv_log_uniform_values", "normal", "q_normal"),
)
OURS = ("-m", "slimconv_lit", "fit")
_MOST_POINTS = 10_000
_NUMBERS = {"min", "max", "mu", "sigma", "q"}
# What any of the distributions can still be drawn from.
_LARGEST, _SMALLEST = 2**53, 1e-290


@dataclass(frozen=True)
class Sweep:
    """A sweep file that has been checked.

    Attributes:
        path: The file.
        method: "grid", "random" or "bayes".
        metric: Name of the metric, as the run's results have it: "test/top1".
        maximize: Whether larger is better.
        parameters: What W&B's file says of each parameter.
        options: The options of `fit` that all points share.
        run_cap: How many points a random search draws; None where the file does not say.
    """

    path: Path
    method: str
    metric: str
    maximize: bool
    parameters: Mapping[str, Mapping[str, Any]]
    options: tuple[str, ...]
    run_cap: int | None

    def points(self, count: int | None = None) -> list[Point]:
        """All points of a grid, or `count` (else `run_cap`) of a random search, the same ones each time.

        Raises:
            ValueError: If a random search has no end, a grid has a parameter without an end, or the method is "bayes".
        """
        if self.method == "bayes":
            raise ValueError(
                f"{self.path}: method 'bayes' is the W&B server's: start it with `wandb sweep {self.path}`, or say "
                "`method: random` to run it here"
            )
        number = count or self.run_cap
        if self.method == "grid":
            grid = list(itertools.islice(self._grid(), min(number or _MOST_POINTS + 1, _MOST_POINTS + 1)))
            self._refuse_too_many(len(grid))
            return grid
        self._refuse_too_many(number or 0)
        if not number:
            raise ValueError(f"{self.path}: a random search needs --count, or `run_cap` in the file")
        # Each point has a generator of its own: with a larger count, the first points stay what they were.
        return [
            {name: _draw(rule, rng) for name, rule in self.parameters.items()}
            for rng in (np.random.default_rng((0, i)) for i in range(number))
        ]

    def arguments(self, point: Point) -> list[str]:
        """What one point adds to the options of `fit`, as the W&B agent would: `--name=value`."""
        return [f"--{name}={value}" for name, value in point.items()]

    def _refuse_too_many(self, points: int) -> None:
        if points > _MOST_POINTS:
            raise ValueError(
                f"{self.path}: it has more than {_MOST_POINTS:,} points; --count takes the first ones alone"
            )

    def _grid(self) -> Iterator[Point]:
        axes = {name: self._axis(name, rule) for name, rule in self.parameters.items()}
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))

    def _axis(self, name: str, rule: Mapping[str, Any]) -> list[Any]:
        if "value" in rule:
            return [rule["value"]]
        if "values" in rule:
            return list(rule["values"])
        if isinstance(rule.get("min"), int) and isinstance(rule.get("max"), int):
            # It need not be longer than a sweep may be.
            return list(range(rule["min"], rule["max"] + 1)[: _MOST_POINTS + 1])
        raise ValueError(f"{self.path}: parameters.{name}: a grid needs `values`; a range of fractions has no end")


def find_sweep(name: str) -> Path:
    """The sweep file called `name`: as a path from the current folder, else among the checkout's sweeps.

    Raises:
        FileNotFoundError: If neither exists; the message gives the nearest names.
    """
    folder = CONFIGS / "sweeps"
    for path in (Path(name), CONFIGS.parent / name, folder / name, folder / f"{name}.yaml"):
        if os.path.isfile(path):
            return path
    known = {path.name for place in (Path(), folder) for path in place.glob("*.yaml")}
    raise FileNotFoundError(f"sweep: there is no file {name!r}; {closest(Path(name).name, known)}")


def read_sweep(path: Path) -> Sweep:
    """Reads and checks a sweep file.

    Raises:
        ValueError: If it is not one; the message names the file, the key and what would do.
    """
    values = read_yaml(path, yaml.safe_load)
    _check_keys(values, KEYS, f"{path}: ")
    method = values.get("method")
    if method not in METHODS:
        raise ValueError(f"{path}: method: there is no {method!r}; {closest(str(method), METHODS)}")
    metric = values.get("metric") or {}
    if (
        not isinstance(metric, dict)
        or not isinstance(metric.get("name"), str)
        or metric.get("goal") not in ("maximize", "minimize")
    ):
        raise ValueError(f"{path}: metric needs a name, such as test/top1, and a goal, maximize or minimize")
    parameters = values.get("parameters")
    if not isinstance(parameters, dict) or not parameters:
        raise ValueError(f"{path}: parameters: expected one entry for each option, found {parameters!r}")
    for name, rule in parameters.items():
        if asks_for_imports(f"--{name}"):
            raise ValueError(f"{path}: parameters.{name}: a file cannot say {OPTION}; say it on the command line")
        _check_parameter(f"{path}: parameters.{name}", rule)
    run_cap = values.get("run_cap")
    if run_cap is not None and (type(run_cap) is not int or run_cap < 1):
        raise ValueError(f"{path}: run_cap: expected a number of points, found {str(run_cap)[:80]!r}")
    options = _options(path, values.get("command"))
    return Sweep(path, method, metric["name"], metric["goal"] == "maximize", parameters, options, run_cap)


def _check_keys(values: Mapping[Any, Any], known: set[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise ValueError(f"{where}there is no key {key!r}; {closest(str(key), known)}")


def _check_parameter(where: str, rule: Any) -> None:
    if not isinstance(rule, dict):
        raise ValueError(f"{where}: expected `value`, `values` or a range, found {rule!r}")
    _check_keys(rule, PARAMETER_KEYS, f"{where}: ")
    if "parameters" in rule:
        raise ValueError(f"{where}: nested parameters become one dictionary; write their dotted names instead")
    kind = rule.get("distribution")
    if kind is not None and kind not in DISTRIBUTIONS:
        raise ValueError(f"{where}.distribution: there is no {kind!r}; {closest(str(kind), DISTRIBUTIONS)}")
    values = [rule["value"]] if "value" in rule else rule.get("values", [])
    if not isinstance(values, list) or ("values" in rule and not values):
        raise ValueError(f"{where}.values: expected a list of values, found {rule['values']!r}")
    if None in values:
        # The agent would emit it as "None", which in an option that takes text is a text.
        raise ValueError(f"{where}: an empty value reaches the command line as 'None'; write \"null\", quoted")
    for key in _NUMBERS & rule.keys():
        if type(rule[key]) not in (int, float) or not abs(rule[key]) <= _LARGEST:
            raise ValueError(f"{where}.{key}: expected a number, found {str(rule[key])[:80]!r}")
    needed = {"constant": {"value"}, "categorical": {"values"}}.get(_kind(rule), {"min", "max"})
    needed = {"mu", "sigma"} if "normal" in _kind(rule) else needed
    if not needed <= set(rule):
        raise ValueError(f"{where}: expected `value`, `values`, or {' and '.join(sorted(needed))}")
    _check_range(where, rule)
    if (parts := rule.get("probabilities")) is not None and not _are_probabilities(parts, len(rule.get("values", ()))):
        expected = "a number from 0 to 1 for each of `values`, 1 in all"
        raise ValueError(f"{where}.probabilities: expected {expected}, found {str(parts)[:80]}")


def _check_range(where: str, rule: Mapping[str, Any]) -> None:
    """Raises a ValueError unless the numbers of a rule are such that something can be drawn between them."""
    kind = _kind(rule)
    least = {"q": _SMALLEST, "sigma": 0} | ({"min": _SMALLEST, "max": _SMALLEST} if "log" in kind else {})
    for key in ("q", "sigma", "min", "max"):
        if key in rule and rule[key] < least.get(key, -math.inf):
            bound = "more than 0" if least[key] else "0 or more"
            raise ValueError(f"{where}.{key}: expected {bound} for {kind}, found {rule[key]}")
        if key in rule and kind == "int_uniform" and type(rule[key]) is not int:
            raise ValueError(f"{where}.{key}: expected a whole number for {kind}, found {rule[key]}")
    if {"min", "max"} <= rule.keys() and rule["min"] > rule["max"]:
        raise ValueError(f"{where}.max: expected at least the min of {rule['min']}, found {rule['max']}")


def _are_probabilities(parts: Any, count: int) -> bool:
    return (
        isinstance(parts, list)
        and len(parts) == count
        and all(type(part) in (int, float) and 0 <= part <= 1 for part in parts)
        and math.isclose(sum(parts), 1, abs_tol=1e-8)
    )


def _options(path: Path, command: Any) -> tuple[str, ...]:
    example = "[${env}, ${interpreter}, -m, slimconv_lit, fit, --config, quickstart.yaml, ${args}]"
    if not isinstance(command, Sequence) or isinstance(command, str) or "${args}" not in command:
        raise ValueError(f"{path}: command must be a list with ${{args}} in it, such as {example}")
    words = [str(word) for word in command if word not in ("${env}", "${interpreter}", "${args}")]
    if any(map(asks_for_imports, words)):
        raise ValueError(f"{path}: command: a file cannot say {OPTION}; say it on the command line")
    if tuple(words[:3]) != OURS:
        raise ValueError(f"{path}: command must run `python -m slimconv_lit fit`, such as {example}")
    if unknown := [word for word in words if re.search(r"\$\{", word)]:
        raise ValueError(f"{path}: command: {unknown[0]} is not understood here; ${{args}} is")
    return tuple(words[3:])


def _kind(rule: Mapping[str, Any]) -> str:
    if kind := rule.get("distribution"):
        return str(kind)
    if "value" in rule:
        return "constant"
    if "values" in rule:
        return "categorical"
    whole = isinstance(rule.get("min"), int) and isinstance(rule.get("max"), int)
    return "int_uniform" if whole else "uniform"


def _draw(rule: Mapping[str, Any], rng: np.random.Generator) -> Any:
    kind = _kind(rule)
    match kind.removeprefix("q_"):
        case "constant":
            return rule["value"]
        case "categorical":
            return rule["values"][rng.choice(len(rule["values"]), p=rule.get("probabilities"))]
        case "int_uniform":
            return int(rng.integers(rule["min"], rule["max"], endpoint=True))
        case "log_uniform_values":
            value = np.exp(rng.uniform(np.log(rule["min"]), np.log(rule["max"])))
        case "inv_log_uniform_values":
            value = 1 / np.exp(rng.uniform(np.log(1 / rule["max"]), np.log(1 / rule["min"])))
        case "normal":
            value = rng.normal(rule["mu"], rule["sigma"])
        case _:
            value = rng.uniform(rule["min"], rule["max"])
    step = rule.get("q", 1) if kind.startswith("q_") else 0
    return float(np.round(value / step) * step) if step else float(value)
