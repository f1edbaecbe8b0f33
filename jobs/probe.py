"""`latentrl probe`: what an encoder's latents know of a game's state."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from jobs.encoder_place import EncoderPlace, find_encoder
from jobs.progress import progress
from jobs.workspace import Workspace
from pipeline import velocity
from pipeline.artifact import Encoder, load_encoder
from pipeline.atariari import published, variables
from pipeline.card import describe
from pipeline.errors import UserError
from pipeline.gauges import Gauges
from pipeline.labels import features_of, read_labels
from pipeline.origin import load_origin, require_unseen
from pipeline.outbox import Outbox
from pipeline.probe import MAX_EPOCHS, probe_features, standardised
from pipeline.probed import AS_THEY_ARE, PROBE_FOLDER, PROTOCOL, Probed, learned_elsewhere, write_probe
from pipeline.registry import add_to_run
from pipeline.schema import RULES_OF_PLAY
from pipeline.storage import base_name
from pipeline.store import FramesDataset

POLICY = "random"
METHODS = ("vae", "st-dim", "supervised")  # shown beside


def run(
    workspace: Workspace,
    encoder: str,
    data: str,
    *,
    is_standardised: bool = False,
    with_velocity: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Probes an encoder and records what it finds: in a file, and with the encoder's run and versions in MLflow.

    Args:
        workspace: Where the registry is.
        encoder: Its address.
        data: Folder or address of a dataset of a random agent's frames with RAM.
        is_standardised: Probes each latent scaled to variance 1 instead of the posterior mean as it is.
        with_velocity: Measures too how well the ball's velocity can be read off stacked latents.
        seed: Deals episodes to the probes' parts and draws their weights and batches.

    Returns:
        The keys that `latentrl probe --json` prints.

    Raises:
        UserError: What cannot be measured, or would say nothing.
        TrackingPending: It is measured, but the server has not received it.
    """
    dataset = FramesDataset.open(data if "://" in data else str(Path(data).expanduser().absolute()))
    require_probe_data(dataset)
    if with_velocity and dataset.preprocess.game not in velocity.GAMES:
        raise UserError(f"--velocity is measured on {' and '.join(velocity.GAMES)}, not on {dataset.preprocess.game}")
    place = find_encoder(encoder, workspace)
    network = load_encoder(place.bundle)
    same = {"mine": f"the encoder {place.bundle}", "theirs": "these frames"}
    network.preprocess.require_match(dataset.preprocess, **same, may_differ=RULES_OF_PLAY)
    said = (require_unseen(dataset, load_origin(place.bundle)), learned_elsewhere(network.preprocess.protocol))
    dataset.require_sound_files()
    place.make_folder()
    earlier = place.probes(workspace.tracking_uri)
    measured = _measured(network, dataset, is_standardised=is_standardised, with_velocity=with_velocity, seed=seed)
    result = {"encoder": place.address, "encoder_sha256": place.sha256, "dataset": dataset.uri, **measured}
    remark = " ".join(sentence for sentence in said if sentence)
    result |= {"remark": remark or None, "run_id": place.record.run_id if place.record else None}
    result["record"] = str(write_probe(place.folder, result))
    if place.record is not None:
        say = partial(_say, place, result, earlier)
        add_to_run(place.folder, workspace.tracking_uri, say, result, f"{result['record']} is written")
    return result


def _say(place: EncoderPlace, result: dict[str, Any], earlier: list[Probed], outbox: Outbox) -> None:
    probed = Probed.of(result)
    outbox.append("file", {"path": result["record"], "directory": PROBE_FOLDER})
    outbox.append("metrics", {"step": probed.seed, "values": probed.metrics()})
    describe(outbox, place.bundle, place.sha256, [*earlier, probed])


def _measured(
    network: Encoder, dataset: FramesDataset, *, is_standardised: bool, with_velocity: bool, seed: int
) -> dict[str, Any]:
    began, game = time.perf_counter(), dataset.preprocess.game
    gauges = Gauges("probe", base_name(dataset.uri), game)
    with progress(dataset.num_frames, f"encode {game}", "frames", gauges) as bar:
        labels = read_labels(dataset, seed)
        features = features_of(dataset, network.encode, bar.advance) * network.scale + network.mean
        features = standardised(features, labels) if is_standardised else features
    with progress(MAX_EPOCHS, f"probe {game}", "epochs", gauges) as bar:
        probed = probe_features(features, labels, seed=seed, on_epochs=bar.advance)
    moving = velocity.velocity(features, labels) if with_velocity else None
    return {
        "digest": dataset.digest,
        "game": game,
        "resolution": f"{dataset.preprocess.height}x{dataset.preprocess.width}",
        "features": f"{AS_THEY_ARE}, standardised" if is_standardised else AS_THEY_ARE,
        "seed": seed,
        "f1": probed.f1,
        "accuracy": probed.accuracy,
        "f1_by_category": probed.f1_by_category,
        "f1_by_variable": probed.f1_by_variable,
        "accuracy_by_variable": probed.accuracy_by_variable,
        "epochs_by_variable": probed.epochs,
        "published_f1": published(game),
        "z_dim": network.z_dim,
        "probe_frames": sum(probed.num_frames),
        "test_frames": probed.num_frames[2],
        "duplicates": labels.num_duplicates,
        "dropped_variables": list(labels.dropped),
        **({"velocity_r2": moving.stacked, "velocity_r2_single": moving.single} if moving else {}),
        "seconds": round(time.perf_counter() - began, 1),
    }


def require_probe_data(dataset: FramesDataset) -> None:
    """Refuses a dataset on which the benchmark's figures would mean something else.

    Raises:
        UserError: Another protocol or policy, no RAM, or a game without labels.
    """
    variables(dataset.preprocess.game)
    how = f"`latentrl collect --protocol {PROTOCOL} --part probe --with-ram --resolution 210x160`"
    for what, held, wanted in (
        ("protocol", dataset.preprocess.protocol, PROTOCOL),
        ("policy", dataset.collection.get("policy"), POLICY),
    ):
        if held != wanted:
            raise UserError(f"dataset {dataset.uri} has {what} {held!r}, not {wanted!r}; collect one with {how}")
    if not dataset.has_ram:
        raise UserError(f"dataset {dataset.uri} holds no RAM to take labels from; collect one with {how}")


def present(r: dict[str, Any]) -> str:
    """The result in words: each variable beside the published figures."""
    rows = [("", "F1", "published: vae", "st-dim", "supervised")]
    for name, f1 in [*r["f1_by_variable"].items(), ("", r["f1"])]:
        there = r["published_f1"].get(name, {})
        rows.append((name or r["game"], f"{f1:.3f}", *(_shown(there.get(method)) for method in METHODS)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    for key in ("velocity_r2", "velocity_r2_single"):
        if key in r:
            lines.append(f"{key.replace('_', ' ')}: {', '.join(f'{k} {v:.3f}' for k, v in r[key].items())}")
    lines.append(f"{r['features']}; {r['test_frames']} test frames of {r['resolution']}, {r['seconds']} s")
    where = (
        f"in MLflow with run {r['run_id']}"
        if r["run_id"]
        else f"in {r['record']} only: no run that made it is known here"
    )
    lines.append(f"recorded {where}")
    return "\n".join(f"  {line}" for line in lines) + (f"\nnote: {r['remark']}" if r["remark"] else "")


def _shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"
