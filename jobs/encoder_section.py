"""The part of an agent's page that is about its encoder, and what the encoder's own page has in common with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.figures import PICTURES_FOLDER, absent
from jobs.relatives import Relatives
from jobs.workspace import BUNDLE_FOLDER
from pipeline.artifact import load_stats
from pipeline.charts import Chart, line_chart, number, thinned
from pipeline.registry import MIN_ACTIVE_FRACTION
from pipeline.report import Fact, Picture
from pipeline.untrusted import require_plain_entries

Remarks = dict[str, list[str]]  # section of the page: sentences on what is missing or wrong

CAPTIONS = {
    "reconstructions": (
        "Reconstructions.",
        "Frames of the game; what the decoder makes of their latents; how unsure it is of each pixel, where that "
        "differs; and how far off it is. What is missing in the second row, the agent cannot see.",
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
    """The encoder's bundle, where pretraining made it, inside of the policy, or where Q-learning made it of nothing."""
    places = [kin.pretrain.path / BUNDLE_FOLDER] if kin.pretrain else []
    places += [kin.policy / "encoder"] if kin.policy else []
    places += [kin.train.path / BUNDLE_FOLDER] if kin.train else []
    return next((path for path in places if (path / "stats.json").is_file()), None)


def encoder_facts(kin: Relatives, remarks: Remarks) -> list[Fact]:
    """What the encoder of a run is worth, in numbers."""
    bundle = encoder_bundle(kin)
    if bundle is None:
        if kin.policy_config.get("mode") == "pixels":
            remarks["encoder"].append("This agent learned from pixels, without a pretrained encoder.")
        elif kin.train:
            remarks["encoder"].append("This run has no finished encoder.")
        return []
    known = kin.pretrain.result if kin.pretrain else {}
    if kin.train and bundle == kin.train.path / BUNDLE_FOLDER:
        known = {"bits_per_dim": kin.train.result.get("encoder_bits_per_dim")}
    return bundle_facts(bundle, known, remarks)


def bundle_facts(bundle: Path, known: Mapping[str, Any], remarks: Remarks) -> list[Fact]:
    """The same of a bundle; `known` are keys of its pretraining's result."""
    stats = load_stats(bundle)
    facts = [
        Fact("active units", f"{stats.num_active} of {len(stats.active)}", "dimensions that tell frames apart"),
        Fact("information", f"{number(sum(stats.kl))} nats", "KL to the prior, per frame"),
    ]
    if stats.num_active < MIN_ACTIVE_FRACTION * len(stats.active):
        remarks["encoder"].append("This encoder has collapsed: its latents say next to nothing about a frame.")
    return facts + [
        Fact(label, number(float(known[key])), note) for key, (label, note) in FACTS.items() if known.get(key)
    ]


def encoder_curve(trained_on: list[tuple[float, float]], end: float | None) -> Chart | None:
    """Bits per dimension of the batches trained on, with the held-out value at the end as a line to compare with."""
    if len(trained_on) < 2:
        return None
    lines = [(f"held out, at the end {number(end)}", "heldout", float(end))] if end else []
    return line_chart(thinned(trained_on), "training steps", "bits/dim", lines)


def encoder_pictures(kin: Relatives, remarks: Remarks) -> list[Picture]:
    """The pictures that pretraining drew."""
    if kin.pretrain is None:
        if kin.policy_config.get("encoder"):
            sentence = (
                "The run that pretrained this encoder is not among the runs here, so its pictures are not either."
            )
            remarks["pictures"].append(sentence)
        return []
    return plates(kin.pretrain.path / PICTURES_FOLDER, tuple(CAPTIONS), remarks)


def plates(folder: Path, names: Sequence[str], remarks: Remarks) -> list[Picture]:
    """Those of the pictures that a folder has; the others are named in the remarks."""
    if folder.is_dir():
        require_plain_entries(folder, f"the pictures in {folder}")
    if missing := absent(folder, names):
        remarks["pictures"].append(f"Pretraining left no {', '.join(missing)}.")
    return [Picture(folder / f"{name}.png", *CAPTIONS[name]) for name in names if name not in missing]
