"""Silences what is known to be harmless, one message at a time and each with its reason."""

import logging
import warnings

_WARNINGS = {
    # Lightning 2.6 asks torch 2.12+ in the old way whether a tree is a leaf; the answer is the same.
    r".*isinstance\(treespec, LeafSpec\).*": FutureWarning,
    # The run folder is new; what lies in it already are the other logger's files and the configuration.
    r"Experiment logs directory .* exists and is not empty.*": UserWarning,
    # The same of a run that goes on in its folder.
    r"Checkpoint directory .* exists and is not empty.*": UserWarning,
}
_MESSAGES = (
    # Advertisements of other products.
    "try installing [litlogger]",
    "try installing [litmodels]",
    # The schedules count steps, so the loader is always asked for its length.
    "Loading `train_dataloader` to estimate number of stepping batches",
    # Who has a TPU asks for it.
    "TPU available: ",
)
_MESSAGES_BUT_IN_A_FIT = (
    # Nothing is drawn at random.
    "Seed set to ",
    # That matters before hours are spent.
    "GPU available: ",
    # The next line names it again, as loaded.
    "Restoring states from the checkpoint path at ",
)


def _wanted(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _MESSAGES)


def _wanted_but_in_a_fit(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_MESSAGES_BUT_IN_A_FIT)


def quieten(verb: str) -> None:
    """Installs the filters for one of Lightning's verbs; calling it again changes nothing."""
    for message, category in _WARNINGS.items():
        warnings.filterwarnings("ignore", message=message, category=category)
    # The logger behind every `rank_zero_info` and `rank_zero_warn`.
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(_wanted)
    if verb != "fit":
        for name in ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.seed"):
            logging.getLogger(name).addFilter(_wanted_but_in_a_fit)
        # Only a fit that goes on needs the callbacks that the checkpoint was made with.
        warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint need to be provided.*")
        warnings.filterwarnings("ignore", message="The dirpath has changed from .*")
