"""What only looks at a run may fail, and must not end it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from goose_lora.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def only_looks(what: str) -> Iterator[None]:
    """Tell an error inside, and go on with what comes after."""
    try:
        yield
    except UserError as error:
        logger.warning("%s is left out: %s", what, error)
    except Exception as error:  # whatever it is: the run's weights are worth more than a figure
        logger.warning(
            "%s failed and is left out; the run goes on. This is a bug: please report it.",
            what,
            exc_info=error,
        )
