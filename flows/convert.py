"""The convert flow: every checkpoint below SOURCE becomes a proven output below DEST.

List, pass over what is up to date, cut the rest into batches, write each, prove each, collect, leave a
run record, publish a table, and end in a state whose message counts. One checkpoint's fault never stops
the others. All state that a rerun needs lies in DEST (outputs and their manifests); Prefect's caching is
not used, because it would answer for outputs that are gone.

Costs on Prefect's side: at most about 400 task runs and one artifact, however many checkpoints there are.
"""

from __future__ import annotations

from typing import Any

from flows.conversion import Conversion, carry_out
from flows.forms import PLACES
from flows.options import CONVERT
from flows.parsing import refuse_secrets
from flows.requests import Text, convert_request
from flows.run_flow import run_flow


@run_flow(PLACES, CONVERT)
def convert(source: Text, dest: Text, **asked: Any) -> Any:
    """Convert every checkpoint below `source` into `dest`.

    `source_options` and `dest_options` name where storage options lie (`block:NAME`, `env:NAME`); `rename`
    takes `OLD=NEW`. Returns its `RunResult`, and ends Completed; where a checkpoint was rejected or failed
    and that is not acknowledged it ends Failed, which raises `RunFailedError` with the same result.
    """
    if isinstance(asked["files_from"], str):
        refuse_secrets(asked["files_from"])
    return carry_out(convert_request(source, dest, asked), asked, Conversion)
