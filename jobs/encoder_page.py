"""What stands on the page of an encoder: from its place to a `ReportContent`."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from jobs.encoder_place import EncoderPlace
from jobs.encoder_section import Remarks, bundle_facts, encoder_curve, plates
from jobs.page import flat_rows, listing, places, text, train_command
from jobs.probe_section import probe_data_command, probe_summary, probe_table
from jobs.turns_section import turn_groups
from jobs.workspace import Workspace
from pipeline.artifact import load_config, load_preprocess, load_stats
from pipeline.charts import BarChart, bar_chart, number
from pipeline.origin import load_origin
from pipeline.pictures import Figures
from pipeline.probed import Probed, latest, learned_elsewhere
from pipeline.registry import ui_command
from pipeline.report import Command, Fact, ReportContent, Table
from pipeline.untrusted import read_json
from pipeline.views import units


def encoder_content(
    place: EncoderPlace, pictures: Path, probes: list[Probed], remarks: Mapping[str, list[str]], workspace: Workspace
) -> ReportContent:
    """Everything that the page of an encoder shows, and what is missing on it.

    Args:
        place: The encoder's.
        pictures: Folder with its pictures, as far as there are any.
        probes: What probes found, the oldest first.
        remarks: On what could not be found, by section of the page.
        workspace: For the commands to type next.
    """
    said: Remarks = defaultdict(list, {section: list(sentences) for section, sentences in remarks.items()})
    preprocess, figures = load_preprocess(place.bundle), Figures.read(pictures)
    probed = latest(probes, is_standardised=False)
    if probed is None:
        said["probes"].append(_probe_command(place, workspace))
    elif remark := learned_elsewhere(preprocess.protocol):
        said["probes"].append(remark)
    curve = encoder_curve(place.curve, place.facts.get("bits_per_dim"))
    if curve is None:
        said["encoder_curve"].append(_no_curve(place))
    last = ("samples",) if figures else ()
    first = ("reconstructions",) if figures else ("reconstructions", "traversals", "interpolation", "samples")
    missing: Remarks = defaultdict(list) if not figures else said  # why there are none is told already
    return ReportContent(
        title=f"{preprocess.game.replace('_', ' ').title()}, seen through an encoder",
        subtitle=f"{place.address.removeprefix('models:/')}, protocol {preprocess.protocol}, frames of "
        f"{preprocess.height}x{preprocess.width}.",
        summary=probe_summary(probed, load_config(place.bundle).z_dim),
        stages=_stages(place, probed),
        probes=probe_table(probes, said),
        encoder_facts=bundle_facts(place.bundle, place.facts, said),
        encoder_curve=curve,
        pictures=plates(pictures, first, missing),
        turns=turn_groups(pictures, figures) if figures else [],
        last_pictures=plates(pictures, last, missing),
        units=_units(place),
        settings=_settings(place),
        provenance=_provenance(place, figures),
        commands=_commands(place, workspace),
        remarks=said,
    )


def _no_curve(place: EncoderPlace) -> str:
    if place.record is None:
        return (
            "The run that pretrained this encoder is not known here, so there is no curve of its bits per dimension. "
            f"Type: latentrl report {shlex.quote(place.address)} --home or --tracking-uri of where it was pretrained"
        )
    points = len(place.curve)
    return f"Run {place.record.name} has logged bits per dimension {points} times, too few for a curve."


def _stages(place: EncoderPlace, probed: Probed | None) -> list[Fact]:
    stats, facts = load_stats(place.bundle), place.facts
    stages = [Fact("encoder", f"{len(stats.active)} latents", f"{stats.num_active} of them active")]
    if frames := facts.get("frames"):
        stages.insert(0, Fact("frames", number(frames), "collected, in Parquet"))
    if uri := facts.get("model_uri"):
        name, aliases = str(uri).removeprefix("models:/"), facts.get("aliases") or []
        stages.append(Fact("registered", name, f"in MLflow{listing(' as', aliases)}"))
    if probed:
        stages.append(
            Fact("probed", f"F1 {probed.f1:.2f}", f"{len(probed.f1_by_variable)} variables of the game's state")
        )
    return stages if len(stages) > 1 else []


def _probe_command(place: EncoderPlace, workspace: Workspace) -> str:
    """Why there is no probe, and what to type."""
    make = probe_data_command(preprocess := load_preprocess(place.bundle))
    if make is None:
        return (
            f"AtariARI has no labels for {preprocess.game}, so what this encoder knows of its state cannot be probed."
        )
    return (
        f"Not probed yet. Type: latentrl probe {shlex.quote(place.address)} --data DIR {places(workspace)}; frames for "
        f"it come of: {make}"
    )


def _units(place: EncoderPlace) -> BarChart:
    stats, shape = load_stats(place.bundle), load_config(place.bundle).latent_shape
    found = units(shape, stats.kl, stats.active)
    what = f"channels, each over its {found[0].num_latents} cells" if len(shape) > 1 else "latents"
    lead = (
        f"How much each of the {len(found)} {what} tells of a frame: its KL to the prior, the greatest first. A latent "
        f"is active where the variance of its posterior mean exceeds 0.01: {stats.num_active} of {len(stats.active)} "
        "are."
    )
    return bar_chart([(unit.name, unit.kl, unit.num_active > 0) for unit in found], lead)


def _settings(place: EncoderPlace) -> list[Table]:
    tables = [
        Table("The model: every size (config.json)", flat_rows(read_json(place.bundle / "config.json", "config.json")))
    ]
    config = place.run.yaml("config.yaml") if place.run else {}
    return (
        [*tables, Table(f"Pretraining: every setting ({place.folder.name})", flat_rows(config))] if config else tables
    )


def _provenance(place: EncoderPlace, figures: Figures | None) -> list[Table]:
    origin = load_origin(place.bundle)
    rows = {
        "dataset": place.facts.get("dataset"),
        "dataset digest": origin.digest if origin else place.facts.get("dataset_digest") or place.facts.get("digest"),
        "played by": origin.policy if origin else None,
        "encoder": place.facts.get("model_uri") or place.address,
        "encoder sha256": place.sha256,
        "frames shown": figures.source if figures else None,
        "ROM md5": load_preprocess(place.bundle).rom_md5,
    }
    tables = [Table("What was made from what", [(name, text(value)) for name, value in rows.items() if value])]
    if place.record:
        tables.append(Table("MLflow run", [(place.record.name, place.record.run_id), ("tracking", place.record.uri)]))
    versions = flat_rows(place.run.yaml("versions.yaml")) if place.run else []
    return [*tables, Table("Commit and versions", versions)] if versions else tables


def _commands(place: EncoderPlace, workspace: Workspace) -> list[Command]:
    home, address = places(workspace), shlex.quote(place.address)
    preprocess = load_preprocess(place.bundle)
    commands = [
        Command("Measure what it knows of the game's state.", f"latentrl probe {address} --data DIR {home}"),
        Command("Look at it on other frames.", f"latentrl report {address} --data DIR {home}"),
        Command(
            "Train an agent on this encoder.",
            train_command(preprocess.game, preprocess.protocol, place.address, workspace),
        ),
    ]
    if place.record:
        commands.insert(0, Command("Look at all runs, metrics and models in MLflow.", ui_command(place.record.uri)))
    return commands
