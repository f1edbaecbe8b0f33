"""What stands on the page of a run: from the runs that belong together to a `ReportContent`."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from jobs.change_section import change_content
from jobs.encoder_section import Remarks, encoder_bundle, encoder_curve, encoder_facts, encoder_pictures
from jobs.relatives import RANDOM_PREFIX, Relatives, RunFolder, points
from jobs.workspace import Workspace
from pipeline.artifact import load_stats
from pipeline.charts import Chart, Series, line_chart, number, recent_mean, score, thinned
from pipeline.registry import Tracking, ui_command
from pipeline.report import Command, Fact, Picture, ReportContent, Score, Table
from pipeline.scores import RANDOM_AND_HUMAN
from pipeline.untrusted import require_inside

CURVE_WINDOW = 20


def page_content(run: RunFolder, kin: Relatives, workspace: Workspace) -> ReportContent:
    """Everything that the page of `run` shows, and what is missing on it.

    Args:
        run: The run that the page is of.
        kin: The runs that belong to it.
        workspace: For the commands to type next.
    """
    remarks: Remarks = defaultdict(list)
    scores = _scores(kin, remarks)
    return ReportContent(
        title=_title(kin),
        subtitle=f"Run {run.name}, {_protocol_line(kin)}.",
        summary=_summary(scores),
        stages=_stages(kin),
        scores=scores,
        gameplay=_gameplay(kin, remarks),
        curve=_curve(kin, remarks),
        curve_note=f"Raw points of the games played while learning, exploration included: mean of the last "
        f"{CURVE_WINDOW} games at each point.",
        change=change_content(run, workspace, places(workspace), remarks) if run == kin.train else None,
        encoder_facts=encoder_facts(kin, remarks),
        encoder_curve=_encoder_curve(kin),
        pictures=encoder_pictures(kin, remarks),
        settings=_settings(kin, remarks),
        provenance=_provenance(run, kin),
        commands=_commands(run, kin, workspace),
        remarks=remarks,
    )


def _encoder_curve(kin: Relatives) -> Chart | None:
    if kin.pretrain is None:
        return None
    return encoder_curve(points(kin.pretrain.metrics(), "bits_per_dim"), kin.pretrain.result.get("bits_per_dim"))


def _game(kin: Relatives) -> str:
    judged = kin.evaluation or kin.random
    game = kin.preprocess.get("game") or (judged.result.get("game") if judged else None)
    return str(game) if game else "unknown game"


def _title(kin: Relatives) -> str:
    game = _game(kin).replace("_", " ").title()
    if kin.policy_config:
        modes = {"frozen": "played from frozen latents", "finetune": "played from finetuned latents"}
        modes["online"] = "played from latents that were learned beside it"
        return f"{game}, {modes.get(kin.policy_config['mode'], 'played from pixels')}"
    if kin.evaluation:
        return f"{game}, played by a trained agent"
    return f"{game}, learning to play" if kin.train else f"{game}, played at random"


def _protocol_line(kin: Relatives) -> str:
    judged = kin.evaluation or kin.random
    protocol = kin.preprocess.get("protocol") or (judged.result.get("protocol") if judged else None)
    return f"protocol {protocol}" if protocol else "protocol unknown"


def _summary(scores: list[Score]) -> str:
    if len(scores) < 2:
        return ""
    random, trained = scores[0], scores[-1]
    means = score(trained.mean_return), score(random.mean_return)
    both = "The trained agent scores {} points a game, a random one {}.".format(*means)
    if trained.ci95_low > random.ci95_high:
        return f"{both} It plays better: the 95% intervals are apart."
    if trained.ci95_high < random.ci95_low:
        return f"{both} It plays worse: the 95% intervals are apart."
    return f"{both} The 95% intervals overlap, so this run does not show a difference."


def _scores(kin: Relatives, remarks: Remarks) -> list[Score]:
    found = [("random agent", kin.random), ("trained agent", kin.evaluation)]
    scores = [_score(agent, judged.result) for agent, judged in found if judged and judged.result]
    if kin.train and not kin.evaluation:
        command = f"latentrl evaluate {_policy_address(kin)} --video" if kin.policy else "latentrl train ... --resume"
        remarks["results"].append(f"The trained agent has not been evaluated. Type: {command}")
    if (kin.train or kin.evaluation) and not kin.random:
        command = f"latentrl evaluate {RANDOM_PREFIX}{_game(kin)}"
        remarks["results"].append(f"There are no games by the random agent to compare with. Type: {command}")
    return scores


def _score(agent: str, result: Mapping[str, Any]) -> Score:
    names = ("mean_return", "ci95_low", "ci95_high", "episodes", "human_normalised")
    return Score(agent, *(result[name] for name in names))


def _gameplay(kin: Relatives, remarks: Remarks) -> Picture | None:
    judged = kin.evaluation or (None if kin.train else kin.random)
    film = judged.result.get("video") if judged else None
    if judged is None or not film:
        if kin.train or judged:
            remarks["gameplay"].append("No game has been filmed. Type: latentrl evaluate POLICY --video")
        return None
    if not film["has_reconstruction"]:
        whose = {"random": "The random agent", "pixels": "An agent that learned from pixels"}
        who = whose.get(film["mode"], "This agent")
        remarks["gameplay"].append(f"{who} has no decoder, so there is no reconstruction beside the game.")
    seconds = film["shown_agent_steps"] * kin.preprocess.get("frame_skip", 4) / 60
    return Picture(
        judged.path / require_inside(film["file"], "the run's film"),
        f"{seconds:.0f} seconds of one game.",
        _film_caption(film),
    )


def _film_caption(film: Mapping[str, Any]) -> str:
    caption = (
        f"Episode {film['episode']}, the one with the median return: {number(film['return'])} points in "
        f"{number(film['agent_steps'])} agent steps. Shown {_stretch(film)}."
    )
    if film["mode"] in ("finetune", "online"):
        caption += " The encoder has moved since its decoder was trained; the reconstruction shows how far."
    return caption


def _stretch(film: Mapping[str, Any]) -> str:
    first, shown = film["first_agent_step"], film["shown_agent_steps"]
    if shown >= film["agent_steps"]:
        return "is the whole game"
    if first == 0:
        return f"are its first {number(shown)} steps"
    return f"are steps {number(first)} to {number(first + shown)}, where it gained most"


def _curve(kin: Relatives, remarks: Remarks) -> Chart | None:
    if kin.train is None:
        if kin.evaluation:
            remarks["curve"].append(
                "The run that trained this policy is not among the runs here, so there is no curve."
            )
        return None
    series = _return_series(kin.train.metrics(), remarks)
    if series is None:
        remarks["curve"].append("No game was finished in training, so there is no learning curve.")
        return None
    return line_chart(series, "agent steps", "points a game", _reference_lines(kin))


def _return_series(metrics: list[dict[str, Any]], remarks: Remarks) -> Series | None:
    """From single games where the run logged them (`episode_return`), else from its running mean, without interval."""
    games = points(metrics, "episode_return")
    if games:
        return recent_mean(*zip(*games, strict=True), window=CURVE_WINDOW)
    means = points(metrics, "episode_return_mean")
    if not means:
        return None
    remarks["curve"].append("This run logged no single games, so the curve has no interval.")
    return thinned(means)


def _reference_lines(kin: Relatives) -> list[tuple[str, str, float]]:
    published = RANDOM_AND_HUMAN.get(_game(kin))
    lines = []
    if kin.random:
        mean = float(kin.random.result["mean_return"])
        lines.append((f"random agent {score(mean)}", "random", mean))
    elif published:
        lines.append((f"random agent {number(published[0])} (published)", "random", published[0]))
    if published:
        lines.append((f"human {number(published[1])} (published)", "human", published[1]))
    return lines


def _stages(kin: Relatives) -> list[Fact]:
    """The way from frames to an agent in a few numbers, as far as they are known."""
    stages = []
    if kin.pretrain and (frames := kin.pretrain.result.get("frames")):
        stages.append(Fact("frames", number(frames), "collected, in Parquet"))
    if bundle := encoder_bundle(kin):
        stats = load_stats(bundle)
        stages.append(Fact("encoder", f"{len(stats.active)} latents", f"{stats.num_active} of them active"))
    if kin.pretrain and (uri := kin.pretrain.result.get("model_uri")):
        aliases = kin.pretrain.result.get("aliases") or []
        stages.append(Fact("registered", uri.removeprefix("models:/"), f"in MLflow{listing(' as', aliases)}"))
    if kin.train and (result := kin.train.result):
        workers = len(result.get("steps_per_worker") or {})
        stages.append(Fact("Q-learning", number(result["agent_steps"]), f"agent steps, {_count(workers, 'worker')}"))
    if kin.evaluation and (result := kin.evaluation.result):
        stages.append(
            Fact("agent", score(result["mean_return"]), f"points, {_count(result['episodes'], 'whole game')}")
        )
    return stages if len(stages) > 1 else []


def listing(before: str, words: list[str]) -> str:
    return f"{before} {', '.join(words)}" if words else ""


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _members(kin: Relatives) -> list[tuple[str, RunFolder]]:
    named = {
        "Pretraining": kin.pretrain,
        "Q-learning": kin.train,
        "Evaluation": kin.evaluation,
        "Evaluation of the random agent": kin.random,
    }
    return [(name, run) for name, run in named.items() if run]


def _settings(kin: Relatives, remarks: Remarks) -> list[Table]:
    tables = []
    for name, run in _members(kin):
        rows = flat_rows(run.yaml("config.yaml"))
        if rows:
            tables.append(Table(f"{name}: every setting ({run.name})", rows))
        else:
            remarks["settings"].append(f"{run.name} has no config.yaml.")
    return tables


def flat_rows(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows (dotted key, value as text)."""
    rows = []
    for key, value in tree.items():
        rows += flat_rows(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", text(value))]
    return rows


def text(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _provenance(run: RunFolder, kin: Relatives) -> list[Table]:
    tables = [Table("What was made from what", _lineage_rows(kin))] if _lineage_rows(kin) else []
    runs = [(f"{name}: {member.name}", member.record.run_id) for name, member in _members(kin)]
    tables.append(Table("MLflow runs", [*runs, ("tracking", run.record.uri)]))
    versions = flat_rows(run.yaml("versions.yaml"))
    return [*tables, Table("Commit and versions", versions)] if versions else tables


def _lineage_rows(kin: Relatives) -> list[tuple[str, str]]:
    encoder = kin.policy_config.get("encoder") or {}
    pretrain = kin.pretrain.result if kin.pretrain else {}
    judged = kin.evaluation.result if kin.evaluation else {}
    rows = {
        "dataset": pretrain.get("dataset"),
        "dataset digest": pretrain.get("dataset_digest") or pretrain.get("digest"),
        "encoder": pretrain.get("model_uri") or encoder.get("address"),
        "encoder version": pretrain.get("version") or encoder.get("version"),
        "encoder sha256": pretrain.get("sha256") or encoder.get("sha256"),
        "policy": (kin.train.result.get("model_uri") if kin.train else None) or judged.get("policy"),
        "policy's folder": kin.policy,
        "policy sha256": judged.get("policy_sha256") or (kin.train.bundle_sha256("policy") if kin.train else None),
        "ROM md5": kin.preprocess.get("rom_md5"),
    }
    return [(name, text(value)) for name, value in rows.items() if value]


def _policy_address(kin: Relatives) -> str:
    result = kin.train.result if kin.train else {}
    return shlex.quote(str(result.get("model_uri") or result.get("policy") or kin.policy or "POLICY"))


def places(workspace: Workspace) -> str:
    """The options by which another command finds the same runs and models."""
    options = f"--home {shlex.quote(str(workspace.home))}"
    if workspace.tracking_uri != Workspace.at(str(workspace.home)).tracking_uri:
        options += f" --tracking-uri {shlex.quote(Tracking(workspace.tracking_uri).uri)}"  # without a password
    return options


def train_command(game: str, protocol: str, encoder: str, workspace: Workspace) -> str:
    """How to train an agent on an encoder's latents; other rules than those that it learned under are refused."""
    return (
        f"latentrl train --game {shlex.quote(game)} --protocol {shlex.quote(protocol)} --encoder "
        f"{shlex.quote(encoder)} --mode frozen --agent-steps 400000 --num-env-runners 1 {places(workspace)}"
    )


def _commands(run: RunFolder, kin: Relatives, workspace: Workspace) -> list[Command]:
    commands = [Command("Look at all runs, metrics and models in MLflow.", ui_command(run.record.uri))]
    home = places(workspace)
    if kin.policy:
        address = _policy_address(kin)
        commands.append(
            Command(
                "Judge the agent by more games, and film one.",
                f"latentrl evaluate {address} --episodes 100 --video {home}",
            )
        )
    encoder = (
        kin.pretrain.result.get("model_uri")
        if kin.pretrain
        else (kin.policy_config.get("encoder") or {}).get("address")
    )
    if encoder:
        line = train_command(_game(kin), str(kin.preprocess.get("protocol", "atari100k")), encoder, workspace)
        commands.append(Command("Train an agent on this encoder for longer.", line))
        look = f"latentrl report {shlex.quote(encoder)} {home}"
        commands.append(Command("Look at the encoder: turn its latents, see what it knows.", look))
    return commands
