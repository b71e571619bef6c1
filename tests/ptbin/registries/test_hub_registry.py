"""The Hub registry against the stand-in of `tests.servers.hub`, by way of the Hub's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ptbin import convert
from ptbin.catalog import find_manifests
from ptbin.proof.verification import verify_outputs
from ptbin.registries.base import Registration, RegistryError
from ptbin.registries.hub import HubRegistry
from ptbin.registries.values import Model, Version
from tests.servers.hub import Hub, Repository, run_hub

# Of the HTTP client that the Hub's client uses, about how that uses it.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture(scope="module")
def _server() -> Iterator[Hub]:
    import huggingface_hub
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch, run_hub() as hub:
        # The suite is offline; this Hub is on this machine.
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def hub(_server: Hub) -> Hub:
    _server.repositories.clear()
    _server.requests.clear()
    _server.refuse = lambda method, path: None
    return _server


@pytest.fixture
def options(hub: Hub) -> dict[str, str]:
    return {"endpoint": hub.url, "token": "hf_secret"}


@pytest.fixture
def registry(options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubRegistry:
    monkeypatch.chdir(tmp_path)
    return HubRegistry("hf://acme", options)


def version(name: str, **more: Any) -> Version:
    return Version("bert", name, **{"revision": "1", "uri": f"s3://old/bert/{name}", **more})


def ready(registry: HubRegistry, new: Version, *aliases: str, content: bytes = b"weights") -> Registration:
    fingerprint = new.fingerprint("options")
    place = registry.place(Model("bert"), new, new.version, fingerprint)
    folder = Path(place.folder.uri)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.bin", "model.bin.manifest.json"):
        (folder / name).write_bytes(content)
    return Registration(
        new,
        new.version,
        fingerprint,
        place.token,
        ("model.bin.manifest.json",),
        aliases,
        "s3://old",
        "run-1",
        ("model.bin", "model.bin.manifest.json"),
    )


def repository(hub: Hub, name: str = "acme/bert", **tags: str) -> Repository:
    """One with a commit for each different value, on main, and these tags."""
    made = hub.repositories[name] = Repository()
    commits = {text: made.commit("main", {"model.bin": text.encode()}) for text in sorted(set(tags.values()))}
    made.tags = {tag.replace("_", "."): commits[text] for tag, text in tags.items()}
    return made


# -- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "alias", ["main", "1", "", "two words", "a/b", "-x", "a..b", "x.", "x.lock", "refs@{0}"]
)
def test_an_alias_that_would_move_a_versions_tag_or_is_none_is_a_problem(
    registry: HubRegistry, alias: str
) -> None:
    assert registry.alias_problem(alias, ["1", "2"])


@pytest.mark.parametrize("alias", ["champion", "v1.0", "3", "x.locked", "a.b-c_d"])
def test_any_other_alias_is_none(registry: HubRegistry, alias: str) -> None:
    assert registry.alias_problem(alias, ["1", "2"]) is None


def test_a_version_that_can_be_no_tag_stops_no_other(registry: HubRegistry) -> None:
    existing = Model("bert", aliases={"7": "1"})
    names = registry.name_versions(existing, [version(text) for text in ("1", "main", "a b", "7", "2")])
    assert [name.text for name in names] == ["1", "", "", "", "2"]
    assert [bool(name.problem) for name in names] == [False, True, True, True, False]
    assert "alias of version 1" in names[3].problem


# -- source ----------------------------------------------------------------------------------------------


def test_a_version_is_called_by_the_tag_that_looks_like_one(hub: Hub, registry: HubRegistry) -> None:
    made = repository(hub, best="a", v1="a", v2="b", v10_1="c", old="d", older="d")
    (model,) = registry.models(lambda name: True)
    assert [found.version for found in model.versions] == ["old", "v1", "v2", "v10.1"]
    assert model.aliases == {"best": "v1", "older": "old"}
    before = {found.version: found.revision for found in model.versions}
    made.tags["best"] = made.tags["v2"]
    (model,) = registry.models(lambda name: True)
    assert model.aliases == {"best": "v2", "older": "old"}
    assert {found.version: found.revision for found in model.versions} == before


def test_what_is_wrong_with_one_repository_is_its_problem_alone(hub: Hub, registry: HubRegistry) -> None:
    for name in ("a", "b"):
        repository(hub, f"acme/{name}", v1="x")
    hub.refuse = lambda method, path: 403 if path.startswith("/api/models/acme/a/") else None
    for models in (registry.models(lambda name: True), list(registry.existing(["a", "b", "c"]).values())):
        assert [(model.name, bool(model.problem)) for model in models] == [("a", True), ("b", False)]
    assert registry.has_models(lambda name: name == "a")
    assert not registry.has_models(lambda name: name == "c")


# -- destination -----------------------------------------------------------------------------------------


def test_files_that_are_not_there_make_no_version(hub: Hub, registry: HubRegistry) -> None:
    jobs = [ready(registry, version("1")), ready(registry, version("2"))]
    for name in ("model.bin", "model.bin.manifest.json"):
        (Path(jobs[1].token) / name).unlink()
    with pytest.raises(RegistryError, match=r"bert/2: 2 of its 2 files are not in .*model\.bin"):
        registry.register(Model("bert"), jobs)
    made = hub.repositories["acme/bert"]
    assert set(made.tags) == {"1"}
    assert len(made.commits) == 2, "the first one, and that of version 1"


def test_what_an_earlier_attempt_left_is_not_published(hub: Hub, registry: HubRegistry) -> None:
    job = ready(registry, version("1"))
    (Path(job.token) / "left.bin").write_bytes(b"half")
    registry.register(Model("bert"), [job])
    assert "left.bin" not in hub.repositories["acme/bert"].files("1")
    assert not Path(job.token).exists()


def test_one_refused_alias_stops_no_other(hub: Hub, registry: HubRegistry) -> None:
    answers: list[int | None] = [None, 400]
    hub.refuse = lambda method, path: (
        answers.pop(0) if method == "POST" and "/tag/" in path and answers else None
    )
    with pytest.raises(RegistryError, match="tag one"):
        registry.register(Model("bert"), [ready(registry, version("1"), "one", "other")])
    assert set(hub.repositories["acme/bert"].tags) == {"1", "other"}
    answers[:] = [400]
    with pytest.raises(RegistryError, match="tag one"):
        registry.update(Model("bert", "Said."), {"one": "1", "third": "1"}, [])
    assert set(hub.repositories["acme/bert"].tags) == {"1", "other", "third"}
    assert registry.existing(["bert"])["bert"].description == "Said."


def test_an_upload_that_fails_at_the_hub_is_tried_again(hub: Hub, registry: HubRegistry) -> None:
    for status, transient in ((507, True), (400, False)):
        hub.refuse = lambda method, path, status=status: status if "/lfs-upload/" in path else None  # type: ignore[misc]
        with pytest.raises(RegistryError) as caught:
            registry.register(Model("bert"), [ready(registry, version("1"))])
        assert caught.value.transient is transient
    assert hub.repositories["acme/bert"].tags == {}


def test_a_changed_version_is_done_when_its_tag_is_there_again(hub: Hub, registry: HubRegistry) -> None:
    registry.register(Model("bert"), [ready(registry, version("1"), "champion")])
    changed = version("1", revision="2")
    job = ready(registry, changed, "champion", content=b"other weights")
    hub.refuse = lambda method, path: 500 if method == "POST" and "/tag/" in path else None
    with pytest.raises(RegistryError) as caught:
        registry.register(Model("bert"), [job])
    assert caught.value.transient
    hub.refuse = lambda method, path: None
    assert job.fingerprint not in registry.existing(["bert"])["bert"].by_fingerprint()
    registry.register(Model("bert"), [job])
    assert hub.repositories["acme/bert"].files("champion")["model.bin"] == b"other weights"
    found = registry.existing(["bert"])["bert"]
    assert (set(found.by_fingerprint()), found.aliases) == ({job.fingerprint}, {"champion": "1"})


def test_versions_on_their_way_lie_apart_and_those_of_nobody_go(
    registry: HubRegistry, tmp_path: Path
) -> None:
    kept, left = ready(registry, version("1")), ready(registry, version("2"))
    registry.tidy({kept.fingerprint})
    assert Path(kept.token).is_dir()
    assert not Path(left.token).exists()
    (tmp_path / "elsewhere").mkdir()
    HubRegistry("hf://nobody").tidy(set())


def test_the_place_says_where_its_files_will_be_and_there_they_are_proven(
    hub: Hub, registry: HubRegistry, options: dict[str, str], tmp_path: Path, make_checkpoint: Any
) -> None:
    new = version("1")
    place = registry.place(Model("bert"), new, "1", new.fingerprint("options"))
    assert place.final.uri == "hf://acme/bert@1"
    convert(str(make_checkpoint("tied").path), f"{place.folder.uri}/model.bin")
    files = tuple(sorted(path.name for path in Path(place.token).iterdir()))
    manifests = ("model.bin.manifest.json",)
    job = Registration(
        new, "1", new.fingerprint("options"), place.token, manifests, (), "s3://old", "run-1", files
    )
    registry.register(Model("bert"), [job])
    (manifest,) = find_manifests(place.final.uri, storage_options=options)
    assert manifest == "hf://acme/bert@1/model.bin.manifest.json"
    issues, digests = verify_outputs(manifest, storage_options=options)
    assert list(issues) == []
    assert list(digests) == ["hf://acme/bert@1/model.bin"]
    made = hub.repositories["acme/bert"]
    damaged = dict(made.files("1"))
    damaged["model.bin"] = damaged["model.bin"][:-1] + b"?"
    made.tags["1"] = made.commit("main", damaged)
    issues, _ = verify_outputs(manifest, storage_options=options)
    assert [issue.reason for issue in issues] == ["checksum_mismatch"]
    assert json.loads(damaged["registry.json"])["versions"][0]["manifests"] == ["model.bin.manifest.json"]
