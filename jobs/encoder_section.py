"""The part of a run's page that is about its encoder: numbers, curve, pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.relatives import Relatives, points
from jobs.workspace import BUNDLE_FOLDER
from pipeline.artifact import load_stats
from pipeline.charts import Chart, line_chart, number, thinned
from pipeline.registry import MIN_ACTIVE_FRACTION
from pipeline.report import Fact, Picture

Remarks = dict[str, list[str]]  # section of the page: sentences on what is missing or wrong

CAPTIONS = {
    "reconstructions": (
        "Reconstructions.",
        "Frames of the game; what the decoder makes of their latents; how unsure it is of each pixel; and how far "
        "off it is. What is missing in the second row, the agent cannot see.",
    ),
    "traversals": (
        "The most active dimensions.",
        "One dimension moved through the range it takes on real frames while all others stay; at the right, where the "
        "picture changes. KL is the information that the dimension carries about a frame.",
    ),
    "interpolation": (
        "Between two frames.",
        "On the straight line between two latents the decoder shows possible frames where it has learned the game's "
        "geometry; on the line between the pixels one frame only fades into the other.",
    ),
    "samples": (
        "Drawn from the prior.",
        "Frames that the model makes up: latents drawn from N(0, I), decoded.",
    ),
}
FACTS = {
    "elbo_nats": ("ELBO", "nats per frame; higher is better"),
    "bits_per_dim": ("bits/dim", "bits per pixel; lower is better"),
    "images_per_s": ("images/s", "while pretraining"),
}


def encoder_bundle(kin: Relatives) -> Path | None:
    """The encoder's bundle, where pretraining made it or inside of the policy."""
    places = [kin.pretrain.path / BUNDLE_FOLDER] if kin.pretrain else []
    places += [kin.policy / "encoder"] if kin.policy else []
    return next((path for path in places if (path / "stats.json").is_file()), None)


def encoder_facts(kin: Relatives, remarks: Remarks) -> list[Fact]:
    """What the encoder is worth, in numbers."""
    bundle = encoder_bundle(kin)
    if bundle is None:
        if kin.policy_config.get("mode") == "pixels":
            remarks["encoder"].append("This agent learned from pixels, without a pretrained encoder.")
        elif kin.train or kin.pretrain:
            remarks["encoder"].append("This run has no finished encoder.")
        return []
    stats = load_stats(bundle)
    facts = [
        Fact("active units", f"{stats.num_active} of {len(stats.active)}", "dimensions that tell frames apart"),
        Fact("information", f"{number(sum(stats.kl))} nats", "KL to the prior, per frame"),
    ]
    if stats.num_active < MIN_ACTIVE_FRACTION * len(stats.active):
        remarks["encoder"].append("This encoder has collapsed: its latents say next to nothing about a frame.")
    return facts + (_pretrain_facts(kin.pretrain.result) if kin.pretrain else [])


def _pretrain_facts(result: Mapping[str, Any]) -> list[Fact]:
    return [Fact(label, number(float(result[key])), note) for key, (label, note) in FACTS.items() if result.get(key)]


def encoder_curve(kin: Relatives) -> Chart | None:
    """Bits per dimension of the batches trained on, with the held-out value at the end as a line to compare with."""
    if kin.pretrain is None:
        return None
    trained_on = points(kin.pretrain.metrics(), "bits_per_dim")
    if len(trained_on) < 2:
        return None
    end = kin.pretrain.result.get("bits_per_dim")
    lines = [(f"held out, at the end {number(end)}", "heldout", float(end))] if end else []
    return line_chart(thinned(trained_on), "training steps", "bits/dim", lines)


def encoder_pictures(kin: Relatives, remarks: Remarks) -> list[Picture]:
    """The pictures that pretraining drew."""
    if kin.pretrain is None:
        if encoder_bundle(kin):
            sentence = (
                "The run that pretrained this encoder is not among the runs here, so its pictures are not either."
            )
            remarks["pictures"].append(sentence)
        return []
    folder = kin.pretrain.path / "pictures"
    absent = [name for name in CAPTIONS if not (folder / f"{name}.png").is_file()]
    if absent:
        remarks["pictures"].append(f"Pretraining left no {', '.join(absent)}.")
    return [Picture(folder / f"{name}.png", *CAPTIONS[name]) for name in CAPTIONS if name not in absent]
