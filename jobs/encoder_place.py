"""An encoder as pages and probes see it: its bundle, the run that made it, and where its figures lie."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.relatives import RunFolder, newest_first, points
from jobs.workspace import BUNDLE_FOLDER, Workspace
from pipeline import bundle
from pipeline.delivery import SHA256_TAG
from pipeline.errors import UserError
from pipeline.probed import PROBE_FOLDER, Probed
from pipeline.records import Records
from pipeline.registry import resolve
from pipeline.server import Address
from pipeline.tracking import RUN_FILE, RunRecord

STAGE = "pretrain"


@dataclass(frozen=True)
class EncoderPlace:
    """Where an encoder is at home.

    Attributes:
        bundle: Its bundle.
        sha256: The bundle's.
        address: By which a command finds it.
        folder: Where its page, probes and pictures go: its run's, or one of its own in the home.
        record: Of the run that made it; None where no run is known.
        run: That run's folder, where it is in this home.
        facts: What is known of it beside the bundle: keys as in a pretraining's result.json, as far as known.
        curve: (step, bits per dimension) of its training.
    """

    bundle: Path
    sha256: str
    address: str
    folder: Path
    record: RunRecord | None = None
    run: RunFolder | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    curve: list[tuple[float, float]] = field(default_factory=list)

    def make_folder(self) -> None:
        """Makes the folder, before there is something to lose.

        Raises:
            UserError: The home cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error.strerror}); name another --home") from None

    def own_probes(self) -> list[Probed]:
        """What is recorded of probes on this machine.

        Raises:
            UserError: A record is damaged.
        """
        return Probed.read_all(self.folder / PROBE_FOLDER)

    def probes(self, tracking_uri: str) -> list[Probed]:
        """All that is recorded of what probes found: on this machine, and with the run in MLflow.

        Raises:
            UserError: A record is damaged, or the server does not answer.
        """
        here = {probed.file_name: probed for probed in self.own_probes()}
        there: dict[str, Probed] = {}
        if self.record is not None:
            records = Records(self.record.address(tracking_uri))
            with tempfile.TemporaryDirectory() as scratch:
                if (copies := records.artifacts(self.record.run_id, PROBE_FOLDER, Path(scratch))) is not None:
                    there = {probed.file_name: probed for probed in Probed.read_all(copies)}
        return [*(probed for name, probed in there.items() if name not in here), *here.values()]


def is_encoder(asked: str) -> bool:
    """Whether a bundle is meant, and not a run: an address of the registry, or a folder with a bundle's checksums."""
    return asked.startswith(("models:", "runs:")) or (Path(asked).expanduser() / bundle.SUMS_FILE).is_file()


def find_encoder(asked: str, workspace: Workspace) -> EncoderPlace:
    """Resolves an encoder's address and finds the run that made it, in this home or else on the tracking server.

    Raises:
        UserError: No encoder, or a server that does not answer.
    """
    address = asked if asked.startswith(("models:", "runs:")) else str(Path(asked).expanduser())
    resolved = resolve(address, workspace.tracking_uri, workspace.cache)
    if resolved.kind != "encoder":
        raise UserError(f"{asked} is a {resolved.kind}, not an encoder; give the encoder's address")
    made_here = (run for run in newest_first(workspace.runs) if run.record.stage == STAGE)
    run = next((run for run in made_here if run.result.get("sha256") == resolved.sha256), None)
    if run is not None:
        return place_of_run(run)
    own = workspace.encoders / _short(resolved.sha256)
    address, found = resolved.uri or str(resolved.path), _on_server(resolved.sha256, workspace.tracking_uri)
    if found is None:
        return EncoderPlace(resolved.path, resolved.sha256, address, own)
    record, facts, curve = found
    own = own.with_name(f"{own.name}-{record.run_id[:8]}")
    place = EncoderPlace(resolved.path, resolved.sha256, address, own, record, None, facts, curve)
    if not (own / RUN_FILE).is_file():
        place.make_folder()
        record.write(own)
    return place


def probes_here(sha256: str, workspace: Workspace) -> list[Probed]:
    """What is recorded on this machine of probes of a bundle, the oldest first; contacts no server.

    Raises:
        UserError: A record is damaged.
    """
    made_here = (run for run in newest_first(workspace.runs) if run.record.stage == STAGE)
    folders = [run.path for run in made_here if run.result.get("sha256") == sha256]
    folders += sorted(workspace.encoders.glob(f"{_short(sha256)}*"))
    return [probed for folder in folders for probed in Probed.read_all(folder / PROBE_FOLDER)]


def _short(sha256: str) -> str:
    """What the folder of an encoder in the home is named after."""
    return sha256[:16]


def place_of_run(run: RunFolder) -> EncoderPlace:
    """The encoder of a pretraining whose folder is here.

    Raises:
        UserError: It has no finished encoder.
    """
    path = run.path / BUNDLE_FOLDER
    if not (path / bundle.SUMS_FILE).is_file():
        raise UserError(f"{run.name} has no finished encoder; go on with it: latentrl pretrain ... --resume")
    address = run.result.get("model_uri") or str(path)
    curve = points(run.metrics(), "bits_per_dim")
    return EncoderPlace(path, bundle.sha256_of(path), address, run.path, run.record, run, run.result, curve)


def _on_server(sha256: str, tracking_uri: str) -> tuple[RunRecord, dict[str, Any], list[tuple[float, float]]] | None:
    """The pretraining that made a bundle, as the tracking server has it; None where it knows of none."""
    address = Address.parse(tracking_uri)
    if address.database is not None and not address.database.exists():
        return None  # nothing has been tracked here
    records = Records(tracking_uri)
    runs = [
        run
        for run in records.runs_tagged(SHA256_TAG, {sha256})
        if run.data.tags.get("stage") == STAGE and run.info.lifecycle_stage == "active"
    ]
    if not runs:
        return None
    info, tags = runs[0].info, runs[0].data.tags
    record = RunRecord(
        *(info.run_id, info.experiment_id, address.uri, info.run_name, STAGE, info.start_time),
        tags.get("dataset.game", ""),
    )
    versions = [version for version in records.versions_tagged(SHA256_TAG, {sha256}) if version.run_id == info.run_id]
    facts: dict[str, Any] = {"dataset": tags.get("dataset.uri"), "dataset_digest": tags.get("dataset.digest")}
    facts |= {"frames": _number(tags.get("dataset.frames")), "run_id": info.run_id}
    if versions:
        facts["model_uri"] = f"models:/{versions[0].name}/{versions[0].version}"
        facts["aliases"] = records.aliases_of(versions[0])
        facts["bits_per_dim"] = _number(versions[0].tags.get("bits_per_dim"))
    return record, facts, records.history(info.run_id, "bits_per_dim")


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
