"""`latentrl lineage`: what was made from what, from a real tracking store alone, also where links are gone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lineage_toys import Maker
from mlflow import MlflowClient

from jobs import lineage
from jobs.workspace import Workspace
from pipeline import records, server
from pipeline.bundle import sha256_of
from pipeline.errors import UserError
from pipeline.registry import Tracking


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two datasets (the agent of the first played the second), their encoders, agents and games; all files are gone."""
    folder = tmp_path_factory.mktemp("made")
    maker = Maker(f"sqlite:///{folder}/mlflow.db", folder)
    first = maker.dataset()
    pretrain, encoder = maker.encoder(first, "seer")
    train, policy = maker.agent(encoder.uri, "player")
    _, unregistered = maker.agent("models:/seer@champion", "rejected")
    client = MlflowClient(maker.uri, maker.uri)
    client.delete_model_version("rejected", "1")
    games = [maker.evaluation("models:/player/1", 3.0), maker.evaluation(str(policy), 4.0)]
    facts = maker.resolved("models:/player/1")
    second = maker.dataset(policy="models:/player@latest", policy_uri=facts.uri, policy_sha256=facts.sha256)
    _, other = maker.encoder(second, "seer-again")
    grandchild, _ = maker.agent(other.uri, "player-again")
    kept = shutil.move(unregistered, folder / "kept")
    for name in ("runs", "cache"):
        shutil.rmtree(folder / name)
    return {
        **{"maker": maker, "first": first, "second": second, "encoder": encoder, "pretrain": pretrain},
        **{"train": train, "games": games, "kept": Path(kept), "grandchild": grandchild},
        "workspace": Workspace.at(str(folder / "elsewhere"), maker.uri),
    }


def nodes(result: dict[str, Any]) -> list[dict[str, Any]]:
    def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield node
        for child in node["made"]:
            yield from walk(child)

    return [node for tree in result["trees"] for node in walk(tree)]


def digests(things: list[dict[str, Any]]) -> list[str]:
    return sorted(thing["key"] for thing in things)


def test_which_data_made_this_agent(made: dict[str, Any]) -> None:
    """Asked by version, alias or run: the data of the encoder, with who played it."""
    for asked in ("models:/player/1", "models:/player@latest", made["train"], f"runs:/{made['train']}"):
        result = lineage.run(made["workspace"], asked)
        (data,) = result["data"]
        assert data["key"] == made["first"]["digest"]
        assert data["facts"]["uri"] == made["first"]["uri"]
        assert data["facts"]["frames"] == made["first"]["frames"]
        assert data["facts"]["policy"] == "toy"
        (tree,) = result["trees"]
        assert [tree["kind"], tree["made"][0]["kind"], tree["made"][0]["made"][0]["kind"]] == [
            "data",
            "encoder",
            "agent",
        ]
        assert [node["kind"] for node in nodes(result) if node["is_asked"]] == ["agent"]
        assert f"made from: data {data['key'][:12]}" in lineage.present(result)


def test_a_line_goes_on_over_the_data_that_an_agent_played(made: dict[str, Any]) -> None:
    result = lineage.run(made["workspace"], "models:/player-again/1")
    assert [data["key"] for data in result["data"]] == [made["second"]["digest"], made["first"]["digest"]]
    (tree,) = result["trees"]
    line = [node["kind"] for node in nodes(result)]
    assert line == ["data", "encoder", "agent", "data", "encoder", "agent"]
    assert tree["key"] == made["first"]["digest"]
    below = lineage.run(made["workspace"], made["first"]["uri"])  # the same from the other end
    assert sha256_of(made["kept"]) in digests(below["agents"])
    assert made["grandchild"] not in str(below["agents"])  # it learned on other data, of which this is the origin
    assert made["grandchild"] in str(below["trees"])
    assert len(below["agents"]) == 2


def test_which_agents_use_this_encoder_version(made: dict[str, Any]) -> None:
    """By sha256: also the agent that was given an alias, and the one whose version is deleted."""
    for asked in (made["encoder"].uri, "models:/seer@champion", made["pretrain"], made["encoder"].sha256[:10]):
        result = lineage.run(made["workspace"], asked)
        agents = [node for node in nodes(result) if node["kind"] == "agent"]
        direct = next(node for node in nodes(result) if node["key"] == made["encoder"].sha256)["made"]
        assert digests(result["agents"]) == digests(direct)
        assert {agent["key"] for agent in direct} <= {agent["key"] for agent in agents}
        assert len(direct) == 2
        assert {tuple(agent["versions"]) for agent in direct} == {("models:/player/1",), ()}
        judged = next(agent for agent in direct if agent["versions"])
        games = [node for node in judged["made"] if node["kind"] == "evaluation"]
        assert {node["runs"][0]["run_id"]: node["facts"]["mean_return"] for node in games} == dict(
            zip(made["games"], (3.0, 4.0), strict=True)
        )
        assert {"models:/seer/1": ["champion"]} in [node["versions"] for node in nodes(result)]
    assert "not registered" in lineage.present(result)


def test_a_folder_a_digest_and_a_game_are_starts_too(made: dict[str, Any]) -> None:
    by_folder = lineage.run(made["workspace"], str(made["kept"]))
    assert digests(by_folder["data"]) == [made["first"]["digest"]]
    for asked in (made["first"]["uri"], made["first"]["digest"], made["first"]["digest"][:36]):
        result = lineage.run(made["workspace"], asked)
        assert [node["key"] for node in nodes(result) if node["is_asked"]] == [made["first"]["digest"]]
    game = lineage.run(made["workspace"], made["games"][0])
    assert [node["kind"] for node in nodes(game)] == ["data", "encoder", "agent", "evaluation"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("models:/player/9", "has no version 9"),
        ("seer", "seer is a model with versions; give models:/seer@champion or models:/seer/1$"),
        ("player", "player is a model with versions; give models:/player/1$"),
        ("f" * 32, "no run 'f"),
        ("train-999", "no run 'train-999'"),
        ("runs:/" + "0" * 32, "there is no run 0000"),
        ("no://thing", "cannot use"),
        (".", "not a frames dataset"),
    ],
)
def test_what_is_not_there_is_said(made: dict[str, Any], asked: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lineage.run(made["workspace"], asked)


def test_deleted_runs_and_versions_are_missing_links(made: dict[str, Any], tmp_path: Path) -> None:
    """What is left carries the line: the version of a deleted run, the run of a deleted version, a hash of neither."""
    maker = Maker(made["maker"].uri, tmp_path)
    client, workspace = MlflowClient(maker.uri, maker.uri), Workspace.at(str(tmp_path / "elsewhere"), maker.uri)
    facts = maker.dataset()
    pretrain, encoder = maker.encoder(facts, "guide-0")
    train, policy = maker.agent(encoder.uri, "pupil-0")
    game = maker.evaluation("models:/pupil-0/1", 1.0)

    def asked(what: str) -> tuple[dict[str, Any], str]:
        result = lineage.run(workspace, what)
        return result, lineage.present(result)

    assert asked(game)[0]["missing"] == 0
    client.delete_run(pretrain)
    result, text = asked(game)
    assert digests(result["data"]) == [facts["digest"]]
    assert "the run that made it is deleted" in text
    client.delete_model_version("pupil-0", "1")
    result, text = asked(game)
    assert digests(result["data"]) == [facts["digest"]]
    assert "its version is deleted" in text
    client.delete_model_version("guide-0", "1")
    _delete_for_good(maker.uri, pretrain)
    result, text = asked(game)
    assert result["data"] == []
    assert "no run and no registered version here made these bytes" in text
    assert "models:/guide-0/1" in text  # by what name the agent knew it
    assert "made from: it is not known" in text
    _delete_for_good(maker.uri, train)
    with pytest.raises(UserError, match="no run"):
        asked(train)
    result, text = asked(str(policy))  # its own files still say with what it sees
    assert [node["kind"] for node in nodes(result)] == ["encoder", "agent", "evaluation"]


def _delete_for_good(uri: str, run_id: str) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(uri, "/nowhere")._hard_delete_run(run_id)


def test_a_pipeline_is_one_tree_in_mlflow_and_here(made: dict[str, Any], tmp_path: Path) -> None:
    """Stages that were started one by one with --pipeline nest under one run, which is made once."""
    maker = Maker(made["maker"].uri, tmp_path, pipeline="monday")
    pretrain, encoder = maker.encoder(maker.dataset(), "guide-2")
    train, _ = maker.agent(encoder.uri, "pupil-2")
    game = maker.evaluation("models:/pupil-2/1", 1.0)
    Maker(maker.uri, tmp_path / "other").agent(encoder.uri, "stranger")
    client = MlflowClient(maker.uri, maker.uri)
    parents = {client.get_run(run_id).data.tags["mlflow.parentRunId"] for run_id in (pretrain, train, game)}
    assert len(parents) == 1
    gathering = client.get_run(parents.pop())
    assert (gathering.info.run_name, gathering.info.status) == ("monday", "FINISHED")
    for asked in ("monday", gathering.info.run_id):
        result = lineage.run(Workspace.at(str(tmp_path / "elsewhere"), maker.uri), asked)
        assert [node["kind"] for node in nodes(result)] == ["data", "encoder", "agent", "evaluation"]
        assert [run["run_id"] for node in nodes(result) for run in node["runs"]] == [pretrain, train, game]
    with pytest.raises(UserError, match="pipeline name 'a b' is not usable"):
        Tracking(maker.uri, pipeline="a b")


def test_the_number_of_requests_does_not_grow_with_the_runs(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = Maker(made["maker"].uri, tmp_path)
    _, encoder = maker.encoder(maker.dataset(), "guide-3")
    maker.agent(encoder.uri, "pupil-3")
    client = MlflowClient(maker.uri, maker.uri)
    experiment = client.get_experiment_by_name("latentrl").experiment_id
    workspace = Workspace.at(str(tmp_path / "elsewhere"), maker.uri)
    monkeypatch.setattr(records, "FEW", 3)
    monkeypatch.setattr(lineage, "MAX_SHOWN", 4)
    questions: list[int] = []
    ask = server.ask
    monkeypatch.setattr(server, "ask", lambda *given: questions.append(1) or ask(*given))

    def count(num_runs: int) -> int:
        for number in range(num_runs):
            policy = {"encoder.sha256": encoder.sha256, "bundle_sha256": f"{num_runs}-{number}", "stage": "train"}
            client.create_run(experiment, tags=policy, run_name=f"train-{number}")
            played = {"policy.sha256": f"{num_runs}-{number}", "stage": "evaluate"}
            client.create_run(experiment, tags=played, run_name=f"evaluate-{number}")
        questions.clear()
        result = lineage.run(workspace, encoder.uri)
        assert sum(node["kind"] == "evaluation" for node in nodes(result)) == sum(num_made)
        return len(questions)

    num_made = [4]
    few = count(4)
    num_made.append(9)
    assert count(9) == few
    assert "and 11 more; --json lists all" in lineage.present(lineage.run(workspace, encoder.uri))
