"""What constructors ask of the numbers that they are given."""


def at_least(least: float, **values: float | None) -> None:
    """Refuses numbers that are too small; None passes.

    Raises:
        ValueError: For the first that is less than `least`, or not a number; it names the argument.
    """
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name}={value} must be at least {least}")


def from_0_to_1(**values: float | None) -> None:
    """Refuses numbers that are less than 0 or more than 1; None passes.

    Raises:
        ValueError: For the first; it names the argument.
    """
    for name, value in values.items():
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name}={value} must be from 0 to 1")
