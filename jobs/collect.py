"""`latentrl collect`: plays a game and stores the frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs import room
from jobs.cluster import ray_session
from jobs.progress import progress
from jobs.workspace import Workspace
from pipeline.atari import preprocess_for
from pipeline.collect import Collected, collect, require_room
from pipeline.errors import UserError
from pipeline.gauges import Gauges
from pipeline.machine import cores
from pipeline.policies import RANDOM_POLICIES, BehaviourFactory, random_policy
from pipeline.protocols import RESOLUTIONS
from pipeline.schema import Preprocess
from pipeline.storage import base_name, shown


def run(
    workspace: Workspace,
    *,
    game: str,
    frames: int,
    out: str,
    policy: str = "random",
    protocol: str = "atari100k",
    resolution: str = "84x84",
    seed: int = 0,
    part: str | None = None,
    with_ram: bool = False,
    num_workers: int | None = None,
    epsilon: float = 0.05,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Collects a frames dataset and describes it.

    Args:
        workspace: Where Ray runs and where policies are looked up.
        game: Any spelling of a game.
        frames: Rows to store, exactly.
        out: Folder or pyarrow.fs address.
        policy: "random", "sticky-random" or the address of a policy bundle.
        protocol: Name of the Atari protocol.
        resolution: "84x84" or "210x160".
        seed: Decides the dataset together with the arguments above.
        part: "pretrain" or "probe": whatever the seeds, what is collected for one is never in the other.
        with_ram: Stores the RAM too.
        num_workers: Collecting actors of one CPU each; by default one a CPU of this machine, or of the cluster
            where it is free at the start.
        epsilon: Share of random actions where a policy bundle plays.
        overwrite: Replaces an existing dataset.

    Returns:
        The keys that `latentrl collect --json` prints.
    """
    preprocess = preprocess_for(game, protocol, _size(resolution))
    behaviour, facts = _behaviour(workspace, policy, preprocess, epsilon)
    if num_workers is not None and num_workers < 1:
        raise UserError(f"--num-workers is {num_workers}; ask for at least 1")
    require_room(out, frames, overwrite=overwrite)
    gauges = Gauges("collect", base_name(out), preprocess.game)
    with (
        ray_session(workspace, needs={"CPU": num_workers or 1}, what=_workers(num_workers), data=out),
        progress(frames, f"collect {preprocess.game}", "frames", gauges) as bar,
    ):
        collected = collect(
            out,
            preprocess,
            frames=frames,
            behaviour=behaviour,
            played_by={"policy": policy, **facts},
            seed=seed,
            part=part,
            with_ram=with_ram,
            num_workers=num_workers or _default_workers(workspace),
            overwrite=overwrite,
            on_rows=bar.advance,
        )
    return _described(collected, out)


def _workers(num_workers: int | None) -> str:
    if num_workers is None:
        return "collecting workers"
    return f"{num_workers} collecting worker{'s' * (num_workers != 1)}"


def _default_workers(workspace: Workspace) -> int:
    return cores() if workspace.ray_address is None else room.free_cpus()


def _size(resolution: str) -> tuple[int, int]:
    if resolution not in RESOLUTIONS:
        raise UserError(f"unknown resolution {resolution!r}; choose one of {', '.join(RESOLUTIONS)}")
    return RESOLUTIONS[resolution]


def _behaviour(
    workspace: Workspace, policy: str, preprocess: Preprocess, epsilon: float
) -> tuple[BehaviourFactory, dict[str, Any]]:
    """Who plays, and what the manifest says of it besides the address: an alias may mean another version tomorrow."""
    if policy in RANDOM_POLICIES:
        return random_policy(policy), {}
    if "/" not in policy and ":" not in policy and not Path(policy).is_dir():
        return random_policy(policy), {}  # a plain word that is no policy's address: says which names there are
    from pipeline.resolve import resolve
    from rllib_ext.behaviour import PolicyFactory

    resolved = resolve(policy, workspace.tracking_uri, workspace.cache)
    facts = {"policy_uri": resolved.uri, "policy_sha256": resolved.sha256, "epsilon": epsilon}
    return PolicyFactory.load(resolved.path, preprocess, epsilon), facts


def _described(collected: Collected, out: str) -> dict[str, Any]:
    dataset = collected.dataset
    return {
        "dataset": shown(out) if "://" in out else str(Path(out).expanduser().absolute()),
        "digest": dataset.digest,
        "frames": dataset.num_frames,
        "episodes": dataset.num_episodes,
        "part": dataset.collection.get("part"),
        "bytes_per_frame": round(dataset.num_bytes / dataset.num_frames, 2),
        "frames_per_s": round(dataset.num_frames / collected.seconds, 1),
        "seconds": round(collected.seconds, 2),
        "rows_per_worker": collected.rows_per_worker,
    }
