"""The model card of an encoder as MLflow shows it: the bundle's own, which never changes, and what is known since."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.artifact import CARD_FILE, load_preprocess, load_stats
from pipeline.delivery import MAX_DESCRIPTION_CHARS
from pipeline.outbox import Outbox
from pipeline.probed import PROBE_FOLDER, SHOWN_METHODS, Probed, latest, learned_elsewhere
from pipeline.untrusted import read_bytes

NOTE_TAG = "mlflow.note.content"  # of a run: what MLflow shows as its description
_MOST_CARD_BYTES = 1 << 20
_MOST_OWN_CHARS = 2000


def model_card(bundle: Path, probes: Sequence[Probed]) -> str:
    """Markdown of at most 5,000 characters, which is what MLflow keeps.

    Args:
        bundle: The encoder's.
        probes: Of it, the oldest first; the last one of the protocol's features is shown.
    """
    own = read_bytes(bundle / CARD_FILE, f"the {CARD_FILE} of {bundle}", _MOST_CARD_BYTES).decode(errors="replace")
    stats = load_stats(bundle)
    facts = f"Active units: {stats.num_active} of {len(stats.active)}, {sum(stats.kl):.1f} nats a frame in all."
    probed = latest(list(probes), is_standardised=False)
    text = (
        f"{own[:_MOST_OWN_CHARS].rstrip()}\n\n## What it knows\n\n{facts} Pictures are among the run's artifacts.\n\n"
    )
    if probed is None:
        return (
            f"{text}Not probed yet: `latentrl probe ENCODER --data DIR` measures what it knows of the game's state.\n"
        )
    return _with_rows(text + _heading(probed, learned_elsewhere(load_preprocess(bundle).protocol)), _rows(probed))


def describe(outbox: Outbox, bundle: Path, sha256: str, probes: Sequence[Probed]) -> None:
    """Has MLflow show the card with an encoder's versions and its run.

    Args:
        outbox: Of the run that made it.
        bundle: The encoder's.
        sha256: The bundle's.
        probes: See `model_card`.
    """
    card, probed = model_card(bundle, probes), latest(list(probes), is_standardised=False)
    tags = probed.tags() if probed else {}
    outbox.append("describe", {"sha256": sha256, "description": card, "tags": tags})
    for key, value in {**tags, NOTE_TAG: card}.items():
        outbox.append("tag", {"key": key, "value": value})


def _heading(probed: Probed, remark: str | None) -> str:
    moving = ", ".join(f"{name} {r2:.2f}" for name, r2 in (probed.velocity_r2 or {}).items())
    return (
        f"Linear probes for the state of {probed.game} on {probed.test_frames} test frames of {probed.resolution}, "
        "weighted F1; published figures (arXiv:1906.08226) are of 210x160. The scale of features decides much of such "
        "a score: read it beside that of the same network untrained, too (docs/probe.md)."
        + (f" {remark}" if remark else "")
        + (f" Velocity of the ball, R2: {moving}." if moving else "")
        + f"\n\n| | here | {' | '.join(SHOWN_METHODS)} |\n|---{'|---' * (len(SHOWN_METHODS) + 1)}|\n"
    )


def _rows(probed: Probed) -> list[str]:
    figures = [(f"**{probed.game}**", probed.f1, probed.published())]
    figures += [(name, f1, probed.published(name)) for name, f1 in probed.f1_by_variable.items()]
    return [
        f"| {name} | {f1:.2f} | {' | '.join(_shown(there.get(method)) for method in SHOWN_METHODS)} |\n"
        for name, f1, there in figures
    ]


def _shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


def _with_rows(text: str, rows: list[str]) -> str:
    """As many rows as MLflow takes; says how many are left out."""
    room = MAX_DESCRIPTION_CHARS - len(text) - 100
    kept = [row for index, row in enumerate(rows) if sum(map(len, rows[: index + 1])) <= room]
    rest = f"\n{len(rows) - len(kept)} more: the run's artifacts under `{PROBE_FOLDER}/`.\n"
    return text + "".join(kept) + (rest if len(kept) < len(rows) else "")
