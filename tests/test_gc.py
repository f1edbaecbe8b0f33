"""`latentrl gc`: a dry run changes no byte, and nothing that a resume, an alias or a run at work needs is removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from home_toys import (
    LONG_AGO,
    URI,
    BundleState,
    Registry,
    RunState,
    cached,
    checkpoint,
    snapshot,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lineage_toys import Maker
from mlflow import MlflowClient

from jobs import garbage, gc
from jobs.workspace import Workspace
from pipeline import bundle, server, unused
from pipeline.errors import UserError
from pipeline.outbox import Refused, held
from pipeline.records import Records
from pipeline.tracking import RunRecord
from rllib_ext.checkpoint import find_checkpoint, verify_checkpoint

PLACES = (
    ".",
    "checkpoint",
    "checkpoint/replay",
    "checkpoints",
    "checkpoints/epoch-00001",
    "policy",
    "bundle",
    "encoders",
    "notes",
)
FOREIGN = [
    *((place, name) for place in PLACES for name in ("thesis.tex", "link")),
    (".", "thesis.tmp"),
    *(
        (place, "link")
        for place in (".checkpoint.new-ab12", "staged/version-q", ".gc-old", "encoders/.agent-steps-000020000-ab12")
    ),
]
LEFTOVERS = (
    ".checkpoint.new-ab12",
    ".policy-xy",
    ".bundle-z",
    "staged/version-q",
    "staged/tmpabc",
    ".gc-old",
    "metrics.jsonl.tmp",
    "encoders/.agent-steps-000020000-ab12",
)
SELDOM, MOSTLY = st.sampled_from([False, False, False, True]), st.sampled_from([True, True, True, False])
RUNS = st.builds(
    RunState,
    stage=st.sampled_from(["train", "train", "train", "pretrain", "evaluate"]),
    name=st.sampled_from(["train-pong-frozen", "train-pong"]),
    progress=st.sampled_from(["under way", "finished", "made longer"]),
    checkpoints=st.sampled_from([(), ("checkpoint",), ("checkpoint", "checkpoint.old"), ("checkpoint.old",)]),
    leftovers=st.lists(st.sampled_from(LEFTOVERS), unique=True, max_size=2).map(tuple),
    is_locked=SELDOM,
    is_pending=SELDOM,
    foreign=st.sampled_from([*[None] * 20, *FOREIGN]),
    uses=st.integers(0, 3),
)
BUNDLES = st.builds(BundleState, st.integers(1, 3), SELDOM, MOSTLY, SELDOM, SELDOM)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    runs=st.lists(RUNS, min_size=1, max_size=3),
    bundles=st.lists(BUNDLES, max_size=3, unique_by=lambda state: state.number),
    with_finished=st.booleans(),
    knows=MOSTLY,
)
def test_what_is_needed_stays(
    runs: list[RunState], bundles: list[BundleState], with_finished: bool, knows: bool
) -> None:
    with tempfile.TemporaryDirectory() as place:
        check_what_is_needed_stays(Path(place), runs, bundles, with_finished, knows)


def check_what_is_needed_stays(
    place: Path, runs: list[RunState], bundles: list[BundleState], with_finished: bool, knows: bool
) -> None:
    home, outside = Workspace(place / "home", URI), place / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "file").write_text("others'")
    folders = [state.make(home.runs) for state in runs]
    paths = [state.make(home.cache) for state in bundles]
    (home.cache).mkdir(exist_ok=True)
    (home.cache / "thesis.tex").write_text("mine")
    registry = Registry(
        {cached(b.number): f"models:/m/{b.number}" for b in bundles if b.can_be_fetched},
        {cached(b.number) for b in bundles if b.is_aliased},
    )
    used = {cached(state.uses) for state in runs if state.uses}
    locks = [(folder / "outbox.lock").touch() or held(folder, may_create=False) for folder in folders]
    before = snapshot(place)
    with_lock = [lock for lock, state in zip(locks, runs, strict=True) if state.is_locked]
    for lock in with_lock:
        assert lock.__enter__()

    def sweep(*, delete: bool) -> list[str]:
        found = gc._sweep(home, used, registry if knows else None, with_finished=with_finished, delete=delete)
        assert found.errors == []
        return [str(item.path) for item in found.items]

    would_go = sweep(delete=False)
    assert snapshot(place) == before
    assert len(set(would_go)) == len(would_go)
    assert sorted(sweep(delete=True)) == sorted(would_go)
    after = snapshot(place)
    gone = [place / name for name in before.keys() - after.keys()]
    assert all(any(path.is_relative_to(item) for item in would_go) for path in gone)
    assert not any(Path(item).exists() for item in would_go)
    assert all(after[name][0] == before[name][0] for name in before.keys() & after.keys())
    new = [str(folder.relative_to(place) / garbage.REMOVED_FILE) for folder in folders]
    assert after.keys() - before.keys() <= {*new, "home/cache/.lock"}
    for name, (content, *_) in before.items():
        if name.endswith(("thesis.tex", "thesis.tmp", "/link")) or name.startswith("outside"):
            assert after[name][0] == content
    for state, folder in zip(runs, folders, strict=True):
        a_run_keeps_what_it_needs(state, folder, place, before, after, with_finished, home)
    for state, path in zip(bundles, paths, strict=True):
        is_needed = cached(state.number) in used or state.is_aliased or state.is_recent or state.foreign
        may_go = knows and state.can_be_fetched and not is_needed
        assert path.exists() == (not may_go)
    assert sweep(delete=False) == []
    for lock in with_lock:
        lock.__exit__(None, None, None)


def a_run_keeps_what_it_needs(
    state: RunState,
    folder: Path,
    place: Path,
    before: dict[str, Any],
    after: dict[str, Any],
    with_finished: bool,
    home: Workspace,
) -> None:
    inside = [name for name in before if (place / name).is_relative_to(folder) and place / name != folder]
    if state.is_locked or state.is_pending:
        assert all(after.get(name) == before[name] for name in inside)
        return
    needed = ["run.json", "config.yaml", "result.json", "outbox.jsonl", "outbox.done", "policy", "bundle"]
    kept = folder / "encoders" / "agent-steps-000020000"
    is_newest = home.latest_run_folder(state.name) == folder
    if state.is_resumable:
        needed.append("checkpoints")
    if state.stage == "train" and state.checkpoints and (state.is_resumable or (is_newest and not with_finished)):
        found = find_checkpoint(folder / "checkpoint")
        assert found is not None
        if state.foreign is None:
            verify_checkpoint(found, "run")
        assert "later" in (found / "state.json").read_text()
    for name in inside:
        if (place / name).relative_to(folder).parts[0] in needed or (place / name).is_relative_to(kept):
            assert after.get(name, (None,))[0] == before[name][0]


def test_a_run_that_goes_on_meanwhile_loses_nothing(tmp_path: Path) -> None:
    """A run is opened, checkpointed and killed again and again, while gc removes what that leaves."""
    folder = tmp_path / "train-pong-frozen-001"
    folder.mkdir()
    RunRecord("0" * 32, "1", URI, folder.name, "train", 0).write(folder)
    has_ended, lost = threading.Event(), list[str]()

    def go_on() -> None:
        for number in range(60):
            with held(folder, may_create=True) as is_mine:
                if not is_mine:
                    time.sleep(0.001)  # gc holds it for the time of some renames
                    continue
                found = find_checkpoint(folder / "checkpoint")
                if number > 20 and found is None:
                    lost.append(f"the checkpoint at {number}")
                checkpoint(folder / "checkpoint", str(number))
                (folder / f".checkpoint.new-{number}").mkdir()
            time.sleep(0.001)
        has_ended.set()

    thread = threading.Thread(target=go_on)
    thread.start()
    removed = 0
    while not has_ended.is_set():
        found = garbage.sweep_run(folder, lambda folder: True, with_finished=True, delete=True)
        assert found.errors == []
        removed += len(found.items)
    thread.join()
    assert lost == []
    verify_checkpoint(folder / "checkpoint", "run")
    assert removed > 0


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Maker, MlflowClient, Workspace]:
    home = tmp_path_factory.mktemp("store")
    maker = Maker(f"sqlite:///{home}/mlflow.db", home)
    maker.run("pretrain").close()
    return maker, MlflowClient(maker.uri, maker.uri), Workspace.at(str(home))


def models(result: dict[str, Any]) -> set[str]:
    return {item["what"] for item in result["items"] if item["kind"] == "model"}


def test_models_that_something_needs_stay(
    store: tuple[Maker, MlflowClient, Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Champion, latest, what a run, a version or a dataset was made from, and what others registered from it."""
    maker, client, workspace = store
    facts = maker.dataset()
    for bits in (3.0, 2.0, 4.0, 5.0, 6.0):  # 2 is the champion, 5 the latest; 1, 3 and 4 are nothing
        maker.encoder(facts, "seer", bits=bits)
    users = [maker.agent("models:/seer/1", "player") for _ in range(3)]  # 3 is the latest
    maker.evaluation("models:/player/1", 1.0)
    client.copy_model_version("models:/seer/4", "copies")
    client.delete_model_version("player", "2")
    shutil.rmtree(maker.folder / "runs")  # whose folders would say what they use
    assert models(gc.run(workspace, versions=True)) == set()  # all too young to tell
    monkeypatch.setattr(unused, "SETTLED_S", -60.0)
    before = snapshot(workspace.home)
    (orphan,) = models(gc.run(workspace))
    assert orphan.startswith("models:/m-")
    assert models(gc.run(workspace, versions=True)) == {orphan, "models:/seer/3"}
    assert snapshot(workspace.home) == before
    what_is_used_meanwhile_stays(maker, client, workspace)
    result = gc.run(workspace, versions=True, delete=True)
    assert models(result) > {orphan, "models:/seer/3"}  # and what is left of "brief"
    assert result["errors"] == []
    assert result["bytes"] > 10_000
    assert not list((workspace.home / "artifacts" / "models" / orphan.removeprefix("models:/")).rglob("*.safetensors"))
    kept = {f"{version.name}/{version.version}" for version in client.search_model_versions()}
    assert kept == {"seer/1", "seer/2", "seer/4", "seer/5", "player/1", "player/3", "copies/1"}
    for name in sorted(kept - {"copies/1"}):
        maker.resolved(f"models:/{name}")
    assert models(gc.run(workspace, versions=True)) == set()
    for run_id, _ in users:  # what nobody but a deleted run used, nobody uses
        client.delete_run(run_id)
    client.delete_model_version("player", "1")
    client.delete_model_version("player", "3")
    shutil.rmtree(maker.folder / "cache")
    assert "models:/seer/1" in models(gc.run(workspace, versions=True))
    assert any("mlflow gc --backend-store-uri sqlite:" in hint for hint in gc.run(workspace)["hints"])


def what_is_used_meanwhile_stays(maker: Maker, client: MlflowClient, workspace: Workspace) -> None:
    """Between the look and the removal somebody fetches a version, starts a run on it, or gives it an alias."""
    registry = unused.Registry(Records(maker.uri))
    (model,) = (model for model in registry.unused(set(), with_versions=True) if model.address == "models:/seer/3")
    client.set_registered_model_alias("seer", "paper", "3")
    with pytest.raises(UserError, match="has got an alias meanwhile"):
        registry.delete(model)
    client.delete_registered_model_alias("seer", "paper")
    run_id, _ = maker.agent("models:/seer/3", "brief")
    with pytest.raises(UserError, match="has been used meanwhile"):
        registry.delete(model)
    client.delete_run(run_id)
    client.delete_registered_model("brief")
    shutil.rmtree(maker.folder / "runs")
    assert model.address not in models(gc.run(workspace, versions=True))  # it has just been fetched
    shutil.rmtree(maker.folder / "cache")


def test_what_a_run_fetches_meanwhile_stays(store: tuple[Maker, MlflowClient, Workspace]) -> None:
    maker, _, workspace = store
    maker.encoder(maker.dataset(), "fetched")
    maker.encoder(maker.dataset(), "fetched", bits=0.5)
    path = maker.resolved("models:/fetched/1").path
    registry = unused.Registry(Records(maker.uri))
    has_ended, removed = threading.Event(), list[int]()

    def collect_garbage() -> None:
        while not has_ended.is_set():
            removed.append(len(garbage.sweep_cache(workspace.cache, set(), registry, delete=True).items))

    registry.aliased.clear()
    thread = threading.Thread(target=collect_garbage)
    thread.start()
    for _ in range(15):
        with contextlib.suppress(FileNotFoundError):
            for file in (*path.rglob("*"), path):
                os.utime(file, (LONG_AGO, LONG_AGO))
        found = maker.resolved("models:/fetched/1")
        time.sleep(0.01)
        assert bundle.verify(found.path) == found.sha256
    has_ended.set()
    thread.join()
    assert sum(removed) > 0


def test_files_that_are_not_the_stores_are_never_removed(
    store: tuple[Maker, MlflowClient, Workspace], tmp_path: Path
) -> None:
    """A server says where a model's files are, and might say anything."""
    (tmp_path / "thesis.tex").write_text("mine")
    for address in (server.Address.parse(store[0].uri), server.Address.parse("http://127.0.0.1:9")):
        for location in (tmp_path.as_uri(), str(tmp_path), f"{store[2].home.as_uri()}/artifacts/../runs"):
            with pytest.raises(Refused, match="is no place"):
                server.delete_artifacts(location, address)
    assert (tmp_path / "thesis.tex").exists()


def test_without_its_server_only_the_folders_are_swept(tmp_path: Path) -> None:
    home = Workspace(tmp_path, "http://127.0.0.1:9")
    for _ in range(2):
        RunState().make(home.runs)
    BundleState(1, False, True, False, False).make(home.cache)
    result = gc.run(home, delete=True)
    assert [item["what"] for item in result["items"]] == ["runs/train-pong-001/checkpoint"]
    assert "registered models and cached bundles were left alone" in gc.present(result)
    with pytest.raises(UserError, match="no folder"):
        gc.run(Workspace(tmp_path / "none", URI))


def test_linked_files_free_what_they_free(tmp_path: Path) -> None:
    """The replay's segments have several names: those that go with all of them count, and count once."""
    checkpoint(tmp_path / "a" / "checkpoint", "1")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=os.link)
    alone = garbage.bytes_on_disk([tmp_path / "a"])
    assert alone == [0]
    both = garbage.bytes_on_disk([tmp_path / "a", tmp_path / "b"])
    assert both[0] == 0
    assert both[1] >= 5000
