"""Games that are not played by `latentrl`'s commands: CartPole in pixels, Rally, and the oracles' RAM and states.

Shapes: N frames, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from curves.rally import rally_factory, rally_preprocess

from experiment import cartpole, oracle
from pipeline.collect import lane_seeds
from pipeline.lanes import Lane, LaneWriter
from pipeline.schema import EPISODES_SCHEMA, Preprocess
from pipeline.store import assign_splits, episode_hash, write_manifest
from rllib_ext.runner import EnvFactory

CARTPOLE = "cartpole"
RALLY = "rally"
RALLY_CELL_PIXELS = 3
PRIOR_ENVS = 8


@dataclass(frozen=True)
class World:
    """A game.

    Attributes:
        preprocess: What a frame is.
        factory: Makes the games that are learned.
        prior_factory: Makes those whose random play encoders are made from.
    """

    preprocess: Preprocess
    factory: EnvFactory
    prior_factory: EnvFactory


def world(game: str, *, is_oracle: bool) -> World | None:
    """The game in a form that is not `latentrl`'s own; None where it is Atari on the screen."""
    if game == CARTPOLE:
        if is_oracle:
            return World(cartpole.state_preprocess(), cartpole.state_factory, cartpole.anywhere_state_factory)
        return World(cartpole.cartpole_preprocess(), cartpole.cartpole_factory, cartpole.anywhere_factory)
    if game == RALLY:
        return World(rally_preprocess(RALLY_CELL_PIXELS), rally_factory, rally_factory)
    if is_oracle:
        return World(oracle.ram_preprocess(game), oracle.ram_factory, oracle.ram_factory)
    return None


def random_frames(world: World, num_frames: int, seed: int) -> np.ndarray:
    """Frames (N, H, W) uint8 of uniformly random play."""
    env = world.prior_factory(world.preprocess, PRIOR_ENVS, 1)
    rng = np.random.default_rng(seed)
    frames = [env.reset(np.array(lane_seeds(seed, PRIOR_ENVS), np.int64)).frames]
    while len(frames) * PRIOR_ENVS < num_frames:
        frames.append(env.step(rng.integers(0, env.num_actions, PRIOR_ENVS)).frames)
    env.close()
    return np.concatenate(frames)[:num_frames]


def write_random_play(world: World, root: Path, num_frames: int, seed: int) -> None:
    """Writes a frames dataset of uniformly random play, as `latentrl collect` does for Atari."""
    filesystem, preprocess = pafs.LocalFileSystem(), world.preprocess
    (root / "data").mkdir(parents=True)
    seeds, rng = lane_seeds(seed, PRIOR_ENVS), np.random.default_rng(seed)
    lanes = [Lane(e, seeds[e], num_frames // PRIOR_ENVS) for e in range(PRIOR_ENVS)]
    writers = [LaneWriter(filesystem, str(root), preprocess, lane, False) for lane in lanes]
    env = world.prior_factory(preprocess, PRIOR_ENVS, 1)
    step = env.reset(np.array(seeds, np.int64))
    while not all(writer.is_full for writer in writers):
        actions = rng.integers(0, env.num_actions, PRIOR_ENVS)
        following = env.step(actions)
        for e, writer in enumerate(writers):
            writer.add(step, e, int(actions[e]), float(following.rewards[e]))
        step = following
    env.close()
    results = [writer.close() for writer in writers]
    rows = [(e[0], r.file.name, e[1], e[2], e[3], r.lane.seed) for r in results for e in r.episodes]
    splits = assign_splits([episode_hash(preprocess.game, seed, row[0]) for row in rows])
    columns = [list(column) for column in zip(*[(*row, split) for row, split in zip(rows, splits)])]
    write_manifest(
        filesystem,
        str(root),
        preprocess=preprocess,
        files=tuple(result.file for result in results),
        episodes=pa.table(columns, schema=EPISODES_SCHEMA),
        has_ram=False,
        collection={"policy": "random", "seed": seed},
    )
