"""Untrained agents on disk for tests of what comes after training: real bundles of toy size, real Atari frames."""

from __future__ import annotations

from pathlib import Path

import torch

from pipeline import models
from pipeline.artifact import LatentStats, from_scratch, save_encoder
from pipeline.atari import preprocess_for
from pipeline.bundle import sha256_of
from pipeline.models.vae import VAE, VAESettings
from rllib_ext.networks import QHead, QNetwork
from rllib_ext.policy import PolicyConfig, save_policy
from rllib_ext.settings import QConfig

SETTINGS = VAESettings(z_dim=8, widths=(4,), num_blocks=0)
STACK = 2
HEAD = QConfig(hidden=(8,))


def make_encoder(path: Path, game: str = "breakout") -> Path:
    """An untrained encoder bundle."""
    torch.manual_seed(0)
    preprocess = preprocess_for(game)
    config = SETTINGS.for_frames(preprocess.height, preprocess.width)
    stats = LatentStats((0.1,) * 8, (2.0,) * 8, (True,) * 6 + (False,) * 2, (0.5,) * 8)
    save_encoder(path, VAE(config), stats, preprocess, {"Made for": "tests"})
    return path


def make_policy(path: Path, mode: str = "frozen", *, encoder: Path | None = None, game: str = "breakout") -> Path:
    """An untrained policy bundle; `encoder` is needed in all modes but pixels."""
    torch.manual_seed(1)
    preprocess = preprocess_for(game)
    config = PolicyConfig(
        mode=mode,
        stack=STACK,
        z_shape=(SETTINGS.z_dim,),
        q=HEAD,
        action_names=preprocess.action_set,
        encoder={"address": str(encoder), "version": None, "sha256": sha256_of(encoder)} if encoder else None,
        encoder_config=models.to_record(SETTINGS.for_frames(preprocess.height, preprocess.width)),
    )
    head = QHead(STACK, (SETTINGS.z_dim,), len(preprocess.action_set), HEAD)
    network = QNetwork(head, None if mode == "frozen" else from_scratch(SETTINGS, preprocess))
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    save_policy(path, config, preprocess, weights, encoder_bundle=encoder, card={"Made for": "tests"})
    return path
