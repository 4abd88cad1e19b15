"""What constructors ask of the numbers that they are given."""

import math


def at_least(least: float, **values: float | None) -> None:
    """Refuses numbers that are too small or infinite; None passes.

    Raises:
        ValueError: For the first that is less than `least`, infinite or not a number; it names the argument.
    """
    for name, value in values.items():
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{name}={value} must be at least {least}" + ", and finite" * (value == math.inf))


def from_0_to_1(**values: float | None) -> None:
    """Refuses numbers that are less than 0 or more than 1; None passes.

    Raises:
        ValueError: For the first; it names the argument.
    """
    for name, value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be from 0 to 1")
