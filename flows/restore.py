"""The restore flow: every set of weights below SOURCE becomes a proven `.pt` below DEST.

The same run as a conversion's (`flows.conversion`): listing, what is up to date, batches, retries, record.
Only the work of a batch differs, and that it is proven as part of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from flows.access import Running
from flows.conversion import Conversion, carry_out
from flows.forms import PLACES
from flows.options import RESTORE
from flows.parsing import restore_options
from flows.requests import Text, restore_request
from flows.run_flow import run_flow
from flows.stages import Stage
from ptbin import RestoreOptions
from tasks.converting import restore_batch


class Restoration(Conversion):
    """A conversion whose batches restore."""

    def __init__(self, run: Running, options: RestoreOptions) -> None:
        super().__init__(run)
        self.restore_options = options

    def _making(self) -> Stage:
        values = {"options": self.restore_options}
        return Stage(restore_batch, "restore", values, self._settle_all, self._label)


@run_flow(PLACES, RESTORE)
def restore(source: Text, dest: Text, **asked: Any) -> Any:
    """Restore every set of weights below `source` into `dest`.

    Returns its `RunResult`; ends Failed (`RunFailedError`) where one was rejected or failed. What is up to
    date is passed over, unless a model is named: its code may have changed.
    """
    make = partial(Restoration, options=restore_options(asked))
    return carry_out(restore_request(source, dest, asked), asked, make)
