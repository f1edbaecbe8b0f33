"""The part of a run's page that says how its encoder changed: what each kept one makes of the same frames."""

from __future__ import annotations

import io
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from jobs.encoder_place import probes_here
from jobs.encoder_section import Remarks
from jobs.kept_encoders import ENCODERS_FOLDER, compared_frames, kept_encoders
from jobs.probe_section import probe_data_command
from jobs.relatives import RunFolder, points
from jobs.workspace import Workspace
from pipeline import bundle
from pipeline.artifact import load_model, load_preprocess
from pipeline.charts import line_chart, number, thinned
from pipeline.models.distributions import bits_per_dim
from pipeline.models.latent import LatentModel
from pipeline.probed import Probed, latest, learned_elsewhere
from pipeline.report import Change, Fact, Plot, Version
from pipeline.schema import Preprocess
from pipeline.similarity import linear_cka
from pipeline.tally import Tally
from pipeline.views import as_pixels, decoded

LEAD = (
    "The encoder as it was when Q-learning began, at checkpoints and at the end, each on the same frames: {early} that "
    "the replay held then, and {late} of the last ones that came. Bits/dim is the bound, lower is better. A latent is "
    "active where the variance of its mean over these frames exceeds 0.01. CKA (linear, Kornblith et al. 2019) is of "
    "the latents and those of the last encoder: 1 where a rotation and a scale make one of the other."
)
ORDER = "two frames of early and two of late play, from left to right"
GAP_PIXELS = 2
SHOWN_AT = (0.5, 0.9)  # of the frames, ordered by how far they are from their mean
PLOTS = (
    ("elbo_fresh", "nats per frame", "bound on the newest frames", "elbo_old", "on the oldest that are held"),
    ("stale_share", "share of 1", "latents held of an earlier version", "", ""),
    ("latent_drift", "root mean square, units of z", "how far latents moved when made anew", "", ""),
)

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class _Kept:
    """A kept encoder and what it makes of the frames; `latents` (N, Z), `pictures` (K, H, W) of those shown."""

    agent_steps: int
    path: Path
    early_bits: float
    late_bits: float
    num_active: int
    latents: torch.Tensor
    pictures: Frames
    probed: Probed | None


def change_content(run: RunFolder, workspace: Workspace, home: str, remarks: Remarks) -> Change | None:
    """What the page of a training shows of it; None where the run kept no encoders.

    Args:
        run: The training.
        workspace: Where probes are recorded.
        home: The options by which a command finds the same.
        remarks: Gets what has not been probed, and the command for it.

    Raises:
        UserError: A bundle is damaged, or the frames are not there.
    """
    found = kept_encoders(run.path)
    if not found:
        return None
    preprocess = load_preprocess(found[-1][1])
    early, late = compared_frames(run.path, preprocess)
    shown = np.concatenate([_telling(early), _telling(late)])
    kept = [_looked_at(steps, path, (early, late), shown, workspace) for steps, path in found]
    _remark_on_probes(run, kept, preprocess, home, remarks)
    columns, rows = _probe_table(kept)
    return Change(
        lead=LEAD.format(early=len(early), late=len(late)),
        order=ORDER,
        versions=[Version("The frames", _png(shown)), *(_version(one, kept[-1]) for one in kept)],
        probe_columns=columns,
        probe_rows=rows,
        plots=_plots(run.metrics()),
    )


def _telling(frames: Frames) -> Frames:
    """A usual frame and one of those on which more is seen than usual."""
    far = np.abs(frames - frames.mean(0, dtype=np.float32)).sum((1, 2)).argsort(kind="stable")
    return frames[far[[int(share * (len(far) - 1)) for share in SHOWN_AT]]]


def _looked_at(
    agent_steps: int, path: Path, frames: tuple[Frames, Frames], shown: Frames, workspace: Workspace
) -> _Kept:
    model, (early, late) = load_model(path), (torch.from_numpy(part) for part in frames)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)  # the same draws for all
        both = Tally(model.config.z_dim, torch.device("cpu"))
        early_bits, late_bits = (_bits(model, part, both) for part in (early, late))
        latents = torch.cat([model.features(part) for part in (early, late)])
        pictures = as_pixels(decoded(model, model.features(torch.from_numpy(shown)))[0])
    probed = latest(probes_here(bundle.sha256_of(path), workspace), is_standardised=False)
    num_active = both.stats(model.config).num_active
    return _Kept(agent_steps, path, early_bits, late_bits, num_active, latents, pictures, probed)


def _bits(model: LatentModel, frames: torch.Tensor, also: Tally) -> float:
    own = Tally(model.config.z_dim, torch.device("cpu"))
    for tally in (own, also):
        tally.add(model, frames)
    return bits_per_dim(own.elbo, frames[0].numel())


def _version(one: _Kept, last: _Kept) -> Version:
    cka = linear_cka(one.latents, last.latents)
    facts = [
        Fact("bits/dim, early", number(one.early_bits)),
        Fact("bits/dim, late", number(one.late_bits)),
        Fact("active units", f"{one.num_active} of {one.latents.shape[1]}"),
        Fact("CKA with the last", f"{cka:.3f}" if math.isfinite(cka) else "none"),
    ]
    if one.probed is not None:
        facts.append(Fact("probes, F1", f"{one.probed.f1:.2f}"))
    return Version(f"{one.agent_steps:,} agent steps", _png(one.pictures), facts)


def _png(frames: Frames) -> bytes:
    """Frames (K, H, W) beside each other."""
    gap = np.zeros((frames.shape[1], GAP_PIXELS), np.uint8)
    cells = [part for frame in frames for part in (gap, frame)][1:]
    out = io.BytesIO()
    Image.fromarray(np.concatenate(cells, axis=1)).save(out, format="PNG")
    return out.getvalue()


def _probe_table(kept: Sequence[_Kept]) -> tuple[list[str], list[list[str]]]:
    """Variables by encoders, those that have been probed."""
    probed = [(one.agent_steps, one.probed) for one in kept if one.probed is not None]
    if not probed:
        return [], []
    names = {name: None for _, found in probed for name in found.f1_by_variable}
    rows = [["all (by category)", *(f"{found.f1:.2f}" for _, found in probed)]]
    for name in names:
        figures = [found.f1_by_variable.get(name) for _, found in probed]
        rows.append([name.replace("_", " "), *("" if f1 is None else f"{f1:.2f}" for f1 in figures)])
    return ["", *(f"{steps:,} steps" for steps, _ in probed)], rows


def _remark_on_probes(
    run: RunFolder, kept: Sequence[_Kept], preprocess: Preprocess, home: str, remarks: Remarks
) -> None:
    make = probe_data_command(preprocess)
    probed, missing = [one.probed for one in kept if one.probed], [one for one in kept if not one.probed]
    if make is None:
        remarks["change"].append(f"AtariARI has no labels for {preprocess.game}, so its state cannot be probed.")
    elif missing:
        places = " ".join(shlex.quote(str(one.path)) for one in missing)
        if not probed:
            places = f"{shlex.quote(str(run.path / ENCODERS_FOLDER))}/agent-steps-*"
        how = f'for encoder in {places}; do latentrl probe "$encoder" --data DIR {home}; done'
        which = "Some of these encoders have" if probed else "None of these encoders has"
        remarks["change"].append(f"{which} {'not ' * bool(probed)}been probed. Type: {how}; frames come of: {make}")
    if len({(found.digest, found.seed, found.resolution) for found in probed}) > 1:
        remarks["change"].append("The probes are of several datasets or seeds: compare those of one only.")
    if probed and (remark := learned_elsewhere(preprocess.protocol)):
        remarks["change"].append(remark)


def _plots(metrics: list[dict[str, Any]]) -> list[Plot]:
    """What there are two points or more of."""
    plots = []
    for key, unit, label, second_key, second_label in PLOTS:
        found, second = points(metrics, key), points(metrics, second_key)
        if len(found) > 1:
            other = thinned(second) if len(second) > 1 else None
            plots.append(Plot(line_chart(thinned(found), "agent steps", unit, (), other), label, second_label))
    return plots
