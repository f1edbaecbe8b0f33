"""The part of an encoder's page that says what it knows: its probes beside the published ones."""

from __future__ import annotations

from collections.abc import Sequence

from jobs.encoder_section import Remarks
from pipeline import atariari
from pipeline.charts import number
from pipeline.probed import AS_THEY_ARE, PROTOCOL, SHOWN_METHODS, Probed, latest
from pipeline.report import Mark, ProbeRow, ProbeTable
from pipeline.schema import Preprocess

METHODS = dict(zip(SHOWN_METHODS, ("random network", "VAE", "ST-DIM", "supervised")))
PUBLISHED_AT = "210x160"
LEAD = (
    "What a linear layer can read off the {features}s: weighted F1 of the game's variables, on {frames} test frames of "
    "{resolution}; 1 is perfect. Marks are published figures (Anand et al. 2019), for frames of 210x160. How large the "
    "features are decides much of such a score, so read it beside that of the same network untrained, too "
    "(docs/probe.md).{velocity}"
)


def probe_data_command(preprocess: Preprocess) -> str | None:
    """How to collect frames to probe encoders of such frames on; None for a game without labels."""
    if preprocess.game.replace("_", "") not in atariari.games():
        return None
    return (
        f"latentrl collect --game {preprocess.game} --protocol {PROTOCOL} --part probe --frames 50000 --resolution "
        f"{preprocess.height}x{preprocess.width} --with-ram --out DIR"
    )


def probe_summary(probed: Probed | None, z_dim: int) -> str:
    """One sentence, with the published figures where they are of the same frames."""
    if probed is None:
        return ""
    found = f"A linear layer reads the state of the game off {z_dim} latents with a mean F1 of {probed.f1:.2f}."
    there = probed.published() if probed.resolution == PUBLISHED_AT else {}
    known = ", ".join(f"{METHODS[method]} {f1:.2f}" for method, f1 in there.items())
    return f"{found} Published: {known}." if known else found


def probe_table(probes: list[Probed], remarks: Remarks) -> ProbeTable | None:
    """The last probe of the protocol's features, and of the standardised ones where there is one."""
    probed, scaled = (latest(probes, is_standardised=which) for which in (False, True))
    if probed is None:
        return None
    methods = list(probed.published())
    if not methods:
        remarks["probes"].append(f"There are no published figures for {probed.game}.")
    moving = ", ".join(f"{name} {number(r2)}" for name, r2 in (probed.velocity_r2 or {}).items())
    lead = LEAD.format(
        features=AS_THEY_ARE,
        frames=number(probed.test_frames),
        resolution=probed.resolution,
        velocity=f" Velocity of the ball from four consecutive latents, R\N{SUPERSCRIPT TWO}: {moving}."
        if moving
        else "",
    )
    names = ["", *probed.f1_by_variable]
    rows = [_row(name, probed, [scaled] if scaled else [], methods) for name in names]
    columns = ["", "here", *(["standardised"] if scaled else []), *(METHODS[method] for method in methods)]
    return ProbeTable(lead, [(method, f"{METHODS[method]}, published") for method in methods], columns, rows)


def _row(variable: str, probed: Probed, others: Sequence[Probed], methods: Sequence[str]) -> ProbeRow:
    """Of a variable, or of the game under ""."""
    there = probed.published(variable)
    figures = [p.f1_by_variable.get(variable) if variable else p.f1 for p in (probed, *others)]
    marks = [Mark(method, f"{METHODS[method]} {f1:.2f}", round(100 * f1, 1)) for method, f1 in there.items()]
    cells = ["" if f1 is None else f"{f1:.2f}" for f1 in (*figures, *(there.get(method) for method in methods))]
    percent = round(100 * min(max(figures[0] or 0.0, 0.0), 1.0), 1)
    return ProbeRow(variable.replace("_", " ") or "all (by category)", cells[0], percent, marks, cells)
