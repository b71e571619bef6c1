"""What a run has made, as Prefect's assets: DEST, and its outputs where they are few.

One task run and one event for each asset, each event with SOURCE as what it was made from. A run that made
more outputs than `MAX_OUTPUTS` announces DEST alone, with the counts: a million checkpoints make two events.
Prefect takes keys of the form `scheme://path` without blanks, `%`, `+` in the scheme and some other
characters; a place that has them is not an asset. Nothing else depends on this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.assets import Asset, AssetProperties, add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from pydantic import ValidationError

from ptbin.manifests.manifest import MANIFEST_SUFFIX
from ptbin.runs.outcomes import Converted, Outcome
from ptbin.runs.tally import Tally
from ptbin.stores import public_uri

MAX_OUTPUTS = 100
"""0.13 ms each in the process of the run (100 of them: 13 ms), and a few hundred bytes on the server."""


def asset_of(uri: str, *, url: str | None = None) -> Asset | None:
    """The asset at a place; None where Prefect has no key for it."""
    key = public_uri(uri) if "://" in uri else f"file://{Path(uri).absolute()}"
    try:
        return Asset(key=key, properties=AssetProperties(url=url) if url else None)
    except ValidationError:
        return None


def announce(tally: Tally, *, report: str | None = None) -> int:
    """Report to Prefect what a run has made of SOURCE; the number of task runs that it took.

    `report`: a page about the run, which a browser can open.
    """
    if not (made := tally.made()):
        return 0
    counts = {name: tally.count(name) for name in ("converted", "up_to_date", "rejected", "failed")}
    facts = {"run": tally.run_id, "kind": tally.kind, **counts}
    assets = {asset: facts for asset in [asset_of(tally.place, url=report)] if asset is not None}
    if len(made) <= MAX_OUTPUTS:
        for entry, output in made:
            if (asset := asset_of(output.manifest_uri.removesuffix(MANIFEST_SUFFIX))) is not None:
                assets[asset] = _facts_of(entry, output)
    if not assets:
        return 0
    origin = asset_of(tally.source)

    @materialize(
        *assets,
        by="ptbin",
        name="announce outputs",
        asset_deps=[origin] if origin is not None else [],
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def announce_outputs() -> None:
        for asset, metadata in assets.items():
            add_asset_metadata(asset, metadata)

    announce_outputs()
    return 1


def _facts_of(entry: Outcome, output: Converted) -> dict[str, Any]:
    return {
        "source": entry.source,
        "manifest": output.manifest_uri,
        "tensors": output.tensors,
        "nbytes": sum(file.size for file in output.outputs),
        "sha256": {file.path: file.sha256 for file in output.outputs if file.sha256},
    }
