"""Loaders that begin where an epoch was broken off, and pass over pictures that cannot be read where they may."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from slimconv_lit.data.files import DataError


class Unreadable(NamedTuple):
    """Stands in a batch for an item that cannot be read.

    Attributes:
        message: Why.
        instead: Another item to take its place; None leaves the place empty.
    """

    message: str
    instead: Any


class Skipping(Dataset[Any]):
    """Items of `dataset`, and an `Unreadable` in the place of each that raises a `DataError`.

    Args:
        dataset: Takes an index, or that and a seed.
        replace: Whether the next readable item takes its place, so that batches of training keep their size.
    """

    def __init__(self, dataset: Dataset[Any], replace: bool) -> None:
        self.dataset, self.replace = dataset, replace

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except DataError as error:
            return Unreadable(str(error), self._next(key) if self.replace else None)

    def _next(self, key: int | tuple[int, int]) -> Any:
        index, *seed = key if isinstance(key, tuple) else (key,)
        for step in range(1, len(self)):
            other = (index + step) % len(self)
            try:
                return self.dataset[(other, *seed) if seed else other]
            except DataError:
                continue
        return None


class LeftOut:
    """The pictures of a data set that could not be read; each is told once.

    Args:
        length: Of the data set.
        ceiling: The part of it that may be missing; None for all. One picture always may.

    Attributes:
        messages: Why, one for each picture; it begins with the file's name.
    """

    def __init__(self, length: int, ceiling: float | None) -> None:
        self.length, self.ceiling = length, ceiling
        self.messages: list[str] = []

    def add(self, messages: Sequence[str]) -> None:
        """Notes what a batch is without.

        Raises:
            DataError: If that makes too many.
        """
        for message in messages:
            if message not in self.messages:
                self.messages.append(message)
                rank_zero_warn(f"left out, {len(self.messages)} of {self.length:,} so far: {message}")
        if self.ceiling is not None and len(self.messages) > max(1, self.ceiling * self.length):
            raise DataError(
                f"{len(self.messages)} of {self.length:,} pictures cannot be read, and on_bad_image=skip passes over "
                f"{self.ceiling:.0%} at most; the first: {self.messages[0]}"
            )


class _Collate:
    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any]) -> tuple[Any, list[str]]:
        kept = [item.instead if isinstance(item, Unreadable) else item for item in items]
        kept = [item for item in kept if item is not None]
        return self.collate(kept) if kept else None, [i.message for i in items if isinstance(i, Unreadable)]


class _Rest:
    """The batches of indices that are not done yet."""

    def __init__(self, batches: Any, done: Callable[[], int]) -> None:
        self.batches, self.done = batches, done

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), self.done(), None)


class Loader(DataLoader[Any]):
    """A DataLoader that starts at its first batch and not when it is asked for an iterator.

    Lightning asks for one to learn how long an epoch is, before it has restored which epoch and which batch a resumed
    run was at; workers would begin with the wrong images there and then.

    Args:
        args: Of DataLoader.
        done: How many batches of this epoch are done; asked for at its first batch.
        left_out: Where to note what a `Skipping` data set leaves out; None for another data set.
        own: Of DataLoader.
    """

    def __init__(
        self, *args: Any, done: Callable[[], int] | None = None, left_out: LeftOut | None = None, **own: Any
    ) -> None:
        super().__init__(*args, **own)
        # Lightning makes the loader again from its attributes when it shares the images out among devices.
        self.done, self.left_out = done, left_out

    @property
    def _index_sampler(self) -> Any:
        batches = super()._index_sampler
        return batches if self.done is None else _Rest(batches, self.done)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        collate = self.collate_fn
        try:
            for batch in super().__iter__():
                if isinstance(collate, _Collate) and self.left_out is not None:
                    batch, messages = batch
                    self.left_out.add(messages)
                    if batch is None:
                        continue
                yield batch
        except (ConnectionError, EOFError) as error:
            # What torch says where it has not noticed yet that the other end of the pipe is dead.
            raise RuntimeError("DataLoader worker exited unexpectedly") from error

    def alone(self, index: int) -> Any:
        """The batch of one item; None if it cannot be read."""
        batch = self.collate_fn([self.dataset[index]])
        return batch[0] if isinstance(self.collate_fn, _Collate) else batch

    # Lightning warns of a loader without these two. Its own progress, which `done` asks for, is all there is to know.
    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing."""


def skipping(
    dataset: Dataset[Any], collate: Callable[[Any], Any], replace: bool, ceiling: float | None
) -> tuple[Dataset[Any], Callable[[Any], Any], LeftOut]:
    """What a `Loader` takes to pass over pictures that cannot be read: data set, collate_fn and left_out."""
    return Skipping(dataset, replace), _Collate(collate), LeftOut(len(dataset), ceiling)  # type: ignore[arg-type]
