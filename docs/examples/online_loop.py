"""Mode online in a script of one's own: an encoder goes on learning while Q learns on its latents, and is then kept.

python docs/examples/online_loop.py --out FOLDER [--encoder FOLDER] [--game pong] [--agent-steps 4000]
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import ray
import torch

from jobs.improving import measured, newest_model
from jobs.recipes import train_recipe
from pipeline.artifact import load_encoder, save_encoder
from pipeline.atari import preprocess_for
from pipeline.schema import Preprocess
from rllib_ext.algorithm import RESULTS_KEY, LatentDQN
from rllib_ext.config import LatentDQNConfig


def configuration(preprocess: Preprocess, encoder: Path | None) -> LatentDQNConfig:
    """The recipe `online`, in this process; without an encoder the frames of the warm-up make the first one."""
    recipe = train_recipe("online")
    elbo = dataclasses.replace(recipe.elbo, warmup_agent_steps=500, scratch_updates=100, publish_updates=20)
    return (
        LatentDQNConfig()
        .latent(preprocess=preprocess, mode="online", encoder=encoder, encoder_config=recipe.model, q=recipe.q)
        .latent(elbo=elbo)
        .training(recipe.train.replace(warmup_agent_steps=500, envs_per_runner=4))
        .env_runners(num_env_runners=0)
        .debugging(seed=0)
    )


def train(algorithm: LatentDQN, agent_steps: int) -> None:
    """Collects, improves the encoder, updates Q, and says now and then how the encoder is doing."""
    reported = 0.0
    while algorithm.agent_steps < agent_steps:
        figures = algorithm.train()[RESULTS_KEY]
        if figures["elbo_updates"] >= reported + 50:
            reported = figures["elbo_updates"]
            said = ", ".join(f"{name} {figures[name]:.3g}" for name in ("elbo_fresh", "elbo_old", "stale_share"))
            print(f"{figures['agent_steps']:.0f} agent steps, {reported:.0f} updates on the bound: {said}")


def keep(algorithm: LatentDQN, preprocess: Preprocess, folder: Path) -> None:
    """Writes the encoder as a bundle, and reads it again as anyone would."""
    model, frames = (
        newest_model(algorithm, preprocess),
        algorithm.replay.rows_at("obs", algorithm.replay.draw_rows(512)),
    )
    stats, _ = measured(model, frames)
    save_encoder(folder, model, stats, preprocess, {"Learned": f"online, {algorithm.agent_steps:,} agent steps"})
    z = load_encoder(folder, preprocess=preprocess).encode(torch.from_numpy(frames[:8]))
    print(f"kept in {folder}; latents of eight frames: {tuple(z.shape)}, standard deviation {z.std():.2f}")


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle to be written")
    parser.add_argument("--encoder", type=Path, help="folder of an encoder bundle to start from; nothing: from nothing")
    parser.add_argument("--game", default="pong")
    parser.add_argument("--agent-steps", type=int, default=4_000)
    options = parser.parse_args()
    ray.init(include_dashboard=False, log_to_driver=False)
    preprocess = preprocess_for(options.game)
    encoder = options.encoder and options.encoder.absolute()
    algorithm = configuration(preprocess, encoder).build_algo()
    train(algorithm, options.agent_steps)
    keep(algorithm, preprocess, options.out)
    algorithm.stop()
    ray.shutdown()


if __name__ == "__main__":
    main()
