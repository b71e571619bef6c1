"""Bulk runs replace what ptbin vouches for, and nothing else: on files and on S3, at every kind of place."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ptbin
from flows.cli.app import run as command
from flows.convert import convert
from flows.sync import sync
from ptbin.manifests.claims import claim_place
from ptbin.runs.run_ids import new_run_id
from ptbin.stores import Place, open_store
from tasks.live import LiveRun, open_live_run
from tests.servers.endpoint import S3Endpoint
from tests.servers.faulty_proxy import faulty_proxy
from tests.servers.fixtures import moto_s3

__all__ = ["moto_s3"]

pytestmark = pytest.mark.usefixtures("server")

MINE = b"a training checkpoint, optimizer included"


@dataclass
class Shop:
    """Checkpoints below `in`, a destination `out`, in some store."""

    root: str
    folder: Path
    options: dict[str, Any] = field(default_factory=dict)

    def save(self, name: str, seed: float) -> None:
        torch.save({"w": torch.full((300, 4), seed), "v": torch.ones(5000)}, self.folder / "saved.pt")
        self.put(f"in/{name}", (self.folder / "saved.pt").read_bytes())

    def put(self, path: str, data: bytes) -> None:
        store, root = open_store(self.root, self.options)
        store.write_bytes(f"{root}/{path}", data)

    def read(self, path: str) -> bytes:
        store, root = open_store(self.root, self.options)
        return store.read_bytes(f"{root}/{path}", limit=1 << 30)

    def drop(self, path: str) -> None:
        store, root = open_store(self.root, self.options)
        store.delete(f"{root}/{path}")

    def names(self) -> list[str]:
        store, root = open_store(f"{self.root}/out", self.options)
        return [item.path for item in store.iter_objects(root) if not item.path.startswith("_ptbin/")]

    def run(self, flow: Any = convert, **parameters: Any) -> dict[str, Any]:
        with open_live_run(LiveRun(new_run_id(), self.options, self.options)) as live:
            flow(
                source=f"{self.root}/in",
                dest=f"{self.root}/out",
                run_id=live.run_id,
                return_state=True,
                **parameters,
            )
        return live.summary

    def plan(self, capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
        """What the dry run of a command says."""
        options = json.dumps(self.options)
        sides = ["--source-options", options, "--dest-options", options]
        name, *rest = words
        capfd.readouterr()
        command([name, f"{self.root}/in", f"{self.root}/out", "--dry-run", "--json", *sides, *rest])
        found: dict[str, Any] = json.loads(capfd.readouterr().out)
        return found


# Where the store matters: what a listing tells of an output, and where its claim lies.
ON_BOTH = pytest.mark.parametrize("shop", ["files", "s3"], indirect=True)


@pytest.fixture
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Shop:
    if getattr(request, "param", "files") == "files":
        made = Shop(str(tmp_path / "root"), tmp_path)
    else:
        endpoint: S3Endpoint = request.getfixturevalue("moto_s3")
        made = Shop(f"s3://{endpoint.make_bucket()}", tmp_path, endpoint.storage_options)
    made.save("a.pt", 1.0)
    made.save("b.pt", 2.0)
    return made


PLACES = [
    ("out/a.bin", {}),
    ("out/a.bin.manifest.json", {}),
    ("out/a.bin.index.json", {"format": "raw"}),
    ("out/a.bin.intoto.json", {"provenance": True}),
    ("out/a-00001-of-00002.bin", {"max_shard_size": 10000}),
    ("out/a.bin.index.json", {"max_shard_size": 10000}),
    ("out/a/pytorch_model.bin", {"layout": "hf"}),
    ("out/a/config.json", {"layout": "hf"}),
]


@pytest.mark.parametrize(
    ("shop", "place", "wishes"),
    [("files", *place) for place in PLACES] + [("s3", *PLACES[number]) for number in (0, 4, 7)],
    indirect=["shop"],
)
def test_a_file_in_the_way_stays_and_is_told_in_the_dry_run_as_in_the_run(
    shop: Shop, capfd: pytest.CaptureFixture[str], place: str, wishes: dict[str, Any]
) -> None:
    shop.put(place, MINE)
    shop.put("in/config.json", b'{"layers": 2}')
    words = [
        f"--{key.replace('_', '-')}" + ("" if value is True else f"={value}") for key, value in wishes.items()
    ]
    planned = shop.plan(capfd, "convert", *words)
    summary = shop.run(**wishes)
    for found in (planned, summary):
        (problem,) = found["problems"]
        assert problem["reason"] == "output_exists"
        assert problem["source"].endswith("a.pt")
        assert place in problem["detail"]
        assert "--force" in problem["detail"]
    assert [row["source"].rpartition("/")[2] for row in planned["convert"]] == ["b.pt"]
    assert summary["converted"] == 1
    assert shop.read(place) == MINE
    # Nothing of the one that was refused was written.
    assert [name for name in shop.names() if name.startswith(("a.", "a-", "a/"))] == [place[4:]]
    assert shop.run(**wishes, force=True)["converted"] == 2
    assert shop.read(place) != MINE
    assert not shop.run(**wishes)["problems"]


@ON_BOTH
def test_what_ptbin_made_is_replaced_and_what_was_written_over_it_is_not(
    shop: Shop, capfd: pytest.CaptureFixture[str]
) -> None:
    assert shop.run()["converted"] == 2
    trained = bytearray(shop.read("out/b.bin"))
    trained[200] ^= 255  # of the same size
    shop.put("out/b.bin", bytes(trained))
    shop.save("a.pt", 3.0)
    shop.save("b.pt", 4.0)
    planned = shop.plan(capfd, "convert")
    assert [(row["source"][-4:], row["replaces"], row["replaced"]) for row in planned["convert"]] == [
        ("a.pt", True, ["a.bin"])
    ]
    summary = shop.run()
    for found in (planned, summary):
        (problem,) = found["problems"]
        assert (problem["reason"], problem["source"][-4:]) == ("output_exists", "b.pt")
        assert "no longer what ptbin converted" in problem["detail"]
    assert summary["converted"] == 1
    assert shop.read("out/b.bin") == bytes(trained)


def _leave_as_killed(shop: Shop, name: str) -> None:
    """As a run leaves it that was killed between an output and its manifest."""
    draft = ptbin.stage(
        f"{shop.root}/in/{name}.pt",
        f"{shop.root}/out/{name}.bin",
        source_options=shop.options,
        dest_options=shop.options,
    )
    store, path = open_store(f"{shop.root}/out/{name}.bin", shop.options)
    assert draft.claimed or store.claim_of(path)


@pytest.mark.parametrize("replacing", [False, True])
@ON_BOTH
def test_what_a_killed_run_left_is_done_anew_though_its_source_has_changed(
    shop: Shop, replacing: bool
) -> None:
    if replacing:
        shop.run()
        shop.save("a.pt", 7.0)
    _leave_as_killed(shop, "a")
    shop.save("a.pt", 8.0)
    summary = shop.run()
    assert summary["problems"] == []
    assert summary["converted"] == (1 if replacing else 2)
    store, root = open_store(f"{shop.root}/out/a.bin", shop.options)
    assert ptbin.verify(f"{shop.root}/out/a.bin.manifest.json", storage_options=shop.options) == []
    with pytest.raises(FileNotFoundError):
        claim_place(Place(store, root)).stat()


@ON_BOTH
def test_a_claim_speaks_of_what_was_written_and_of_nothing_else(shop: Shop) -> None:
    """A file that is put there between the killed run and the next one is not ptbin's."""
    _leave_as_killed(shop, "a")
    shop.put("out/a.bin", MINE)
    (problem,) = shop.run()["problems"]
    assert problem["reason"] == "output_exists"
    assert shop.read("out/a.bin") == MINE


@ON_BOTH
def test_an_output_that_lost_its_manifest_is_taken_up_where_it_would_come_out_the_same(shop: Shop) -> None:
    shop.run()
    shop.drop("out/a.bin.manifest.json")
    summary = shop.run()
    assert (summary["converted"], summary["up_to_date"], summary["problems"]) == (1, 1, [])


# -- mirrors -------------------------------------------------------------------------------------


def test_a_mirror_replaces_neither_weights_nor_companions_of_others(
    shop: Shop, capfd: pytest.CaptureFixture[str]
) -> None:
    shop.put("in/README.md", b"of the source")
    shop.put("out/README.md", b"of the destination")
    shop.put("out/a.bin", MINE)
    planned = shop.plan(capfd, "sync", "--delete")
    summary = shop.run(sync, delete=True, backup_dir=f"{shop.root}/saved")
    for found in (planned, summary):
        assert sorted((p["reason"], p["source"].rpartition("/")[2]) for p in found["problems"]) == [
            ("output_exists", "README.md"),
            ("output_exists", "a.pt"),
        ]
    assert shop.read("out/README.md") == b"of the destination"
    assert shop.read("out/a.bin") == MINE
    forced = shop.plan(capfd, "sync", "--force")
    assert {
        row["dest"].rpartition("/")[2]: row["replaced"] for row in forced["convert"] + forced["copy"]
    } == {
        "a.bin": ["a.bin"],
        "README.md": ["README.md"],
    }
    assert not shop.run(sync, force=True)["problems"]
    assert shop.read("out/README.md") == b"of the source"
    assert shop.read("out/a.bin") != MINE


@ON_BOTH
def test_a_mirrors_own_copies_are_replaced_and_edited_ones_are_not(
    shop: Shop, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("README.md", "config.json"):
        shop.put(f"in/{name}", b"one")
    assert not shop.run(sync)["problems"]
    for name in ("README.md", "config.json"):
        shop.put(f"in/{name}", b"three")
    shop.put("out/README.md", b"edited")
    planned = shop.plan(capfd, "sync")
    assert [(row["dest"].rpartition("/")[2], row["replaces"]) for row in planned["copy"]] == [
        ("config.json", True)
    ]
    summary = shop.run(sync)
    assert summary["copied"] == 1
    assert [p["reason"] for p in summary["problems"]] == ["output_exists"]
    assert (shop.read("out/README.md"), shop.read("out/config.json")) == (b"edited", b"three")


# -- what it costs -------------------------------------------------------------------------------


def test_the_listing_tells_what_is_there_without_a_request_for_each(
    moto_s3: S3Endpoint, tmp_path: Path
) -> None:
    root = f"s3://{moto_s3.make_bucket()}"
    with faulty_proxy(moto_s3.url) as proxy:
        shop = Shop(root, tmp_path, replace(moto_s3, url=proxy.url).storage_options)
        shop.save("a.pt", 1.0)
        shop.run(verify="none")
        # The output, which carries its claim, and its manifest.
        assert proxy.operations("/out/a.") == {"put_object": 2}
        shop.save("a.pt", 2.0)
        proxy.requests.clear()
        shop.run(verify="none")
        # The earlier manifest is read once, withdrawn, and followed by the new one. What was there is claimed
        # in a file of its own, and not looked at.
        again = proxy.operations("/out/a.")
    assert again == {"get_object": 1, "put_object": 3, "delete_object": 2}


def test_readme_s_own_sequence_destroys_nothing(shop: Shop) -> None:
    from flows.restore import restore

    before = shop.read("in/a.pt")
    shop.run()
    with open_live_run(LiveRun(new_run_id(), shop.options, shop.options)) as live:
        restore(source=f"{shop.root}/out", dest=f"{shop.root}/in", run_id=live.run_id, return_state=True)
    assert [p["reason"] for p in live.summary["problems"]] == ["output_exists", "output_exists"]
    assert shop.read("in/a.pt") == before
