"""The registry's front: runs, model versions, and addresses resolved to verified bundles.

`resolve` runs once, in the driver. Everyone else is handed the bundle's folder or bytes and contacts no server.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import server
from pipeline.artifact import load_encoder
from pipeline.bundle import verify
from pipeline.delivery import BUNDLE_DIRECTORY, BYTES_TAG, KIND_TAG, SHA256_TAG, save_served_encoder
from pipeline.errors import TrackingPending, UserError
from pipeline.journal import Body
from pipeline.outbox import Outbox, Unreachable, read_results
from pipeline.resolve import Kind, Resolved, resolve
from pipeline.server import ui_command
from pipeline.tracking import (
    CLOSE_PATIENCE_S,
    NAME_RULE,
    USABLE_NAME,
    Run,
    RunRecord,
    Tracking,
    open_outbox,
    pending_message,
    tagged,
)
from pipeline.untrusted import from_record

__all__ = [
    "Registered",
    "Resolved",
    "Run",
    "Tracking",
    "add_to_run",
    "check_model_name",
    "register_encoder",
    "register_policy",
    "registrations",
    "resolve",
    "sync",
    "ui_command",
]

MIN_ACTIVE_FRACTION = 0.1
REGISTER_PATIENCE_S = 15.0
LATE_LOCK_PATIENCE_S = 20.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Registered:
    """A model version as it was made.

    Attributes:
        name: Of the registered model.
        version: A number, as text.
        aliases: Those that it got: ("latest",), ("latest", "champion") or none.
        sha256: Of the bundle.
        collapsed: Whether fewer than 10% of the encoder's units are active.
        kind: "encoder" or "policy".
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    sha256: str
    collapsed: bool
    kind: Kind

    @property
    def uri(self) -> str:
        """The address that means this version for ever: `models:/NAME/3`."""
        return f"models:/{self.name}/{self.version}"


def check_model_name(name: str) -> None:
    """For the start of a stage, so that a name that cannot be registered is not found out at its end.

    Raises:
        UserError: The name has characters that an address or a folder cannot hold.
    """
    if not USABLE_NAME.fullmatch(name):
        raise UserError(f"model name {name!r} is not usable; take {NAME_RULE}")


def register_encoder(
    run: Run,
    bundle: Path,
    name: str,
    *,
    bits_per_dim: float,
    active_fraction: float,
    has_heldout: bool,
    promote: bool = False,
    example_frames: npt.NDArray[np.uint8] | None = None,
    dataset: Mapping[str, Any] | None = None,
) -> Registered | None:
    """Registers an encoder bundle as a new version that also loads with `mlflow.pyfunc.load_model`.

    The version becomes `champion` when its held-out bits/dim is lower than the present champion's or `promote` is
    given. With fewer than 10% active units it gets no alias and the tag `collapsed`, whatever else is given.

    Args:
        run: The pretraining run.
        bundle: The bundle's folder.
        name: Of the registered model; made if need be.
        bits_per_dim: Of the held-out split where there is one.
        active_fraction: Active units over all units, 0 to 1.
        has_heldout: Whether `bits_per_dim` was measured on held-out episodes.
        promote: Make it champion though it did not win.
        example_frames: (N, H, W) uint8, a few real frames as the model's input example; one black frame by default.
        dataset: What it was trained on (`FramesDataset.facts`); recorded on the version, which may outlive the run.

    Returns:
        The version; None when the server is away, in which case the journal keeps the order to register.

    Raises:
        UserError: The bundle is damaged, the name unusable, or the server refuses.
    """
    check_model_name(name)
    encoder = load_encoder(bundle)
    has_collapsed = not active_fraction >= MIN_ACTIVE_FRACTION
    if has_collapsed:
        log.warning(
            "THE ENCODER HAS COLLAPSED: %.1f%% of its units are active, 10%% are needed. It is registered under %r "
            "without alias and tagged collapsed; train longer, or lower beta",
            100 * active_fraction,
            name,
        )
    shape = (encoder.preprocess.height, encoder.preprocess.width)
    example = np.zeros((1, *shape), np.uint8) if example_frames is None else np.asarray(example_frames, np.uint8)
    staged = _staging_folder(run)
    save_served_encoder(staged, bundle, example, encoder.z_dim, run.run_id)
    tags = {
        KIND_TAG: "encoder",
        SHA256_TAG: encoder.sha256,
        "bits_per_dim": repr(float(bits_per_dim)),
        "active_fraction": repr(float(active_fraction)),
        "has_heldout": "true" if has_heldout and math.isfinite(bits_per_dim) else "false",
        "collapsed": "true" if has_collapsed else "false",
        "game": encoder.preprocess.game,
        **tagged("dataset", dataset or {}),
    }
    return _register(run, name, staged, tags, promote=promote)


def register_policy(
    run: Run, bundle: Path, name: str, *, encoder: Resolved | None = None, tags: Mapping[str, Any] | None = None
) -> Registered | None:
    """Registers a policy bundle as a new version with alias `latest`.

    Args:
        run: The reinforcement-learning run.
        bundle: The bundle's folder.
        name: Of the registered model; made if need be.
        encoder: What the policy sees with; recorded on the version. None for a policy on pixels.
        tags: More to record on the version ("mode", "agent_steps").

    Returns:
        The version; None when the server is away (see `register_encoder`).

    Raises:
        UserError: The bundle is damaged, the name unusable, or the server refuses.
    """
    check_model_name(name)
    sha256 = verify(bundle)
    staged = _staging_folder(run)
    shutil.copytree(bundle, staged / BUNDLE_DIRECTORY)
    known = {"uri": encoder.uri or encoder.address, "sha256": encoder.sha256} if encoder else {}
    every_tag = {**(tags or {}), **tagged("encoder", known), KIND_TAG: "policy", SHA256_TAG: sha256}
    return _register(run, name, staged, {key: str(value) for key, value in every_tag.items()}, promote=False)


def sync(folder: Path, tracking_uri: str | None = None) -> int:
    """Delivers what a run's journal still holds.

    Args:
        folder: The run's folder.
        tracking_uri: Read for user and password only, when it is the run's server; the run knows its own address.

    Returns:
        How many operations were delivered; 0 when nothing was pending.

    Raises:
        UserError: Not a run's folder, still being written, or the server does not answer.
        TrackingPending: The server went away during delivery.
    """
    folder = folder.absolute()
    record = RunRecord.read(folder)
    address = record.address(tracking_uri)
    outbox = open_outbox(folder, record, address, lock_wait_s=LATE_LOCK_PATIENCE_S)
    try:
        if outbox.num_pending == 0:
            return 0
        server.check(address, may_create=False)
        try:
            return outbox.drain()
        except Unreachable as error:
            outbox.last_error = str(error)
            raise TrackingPending(pending_message(folder, record.uri, outbox)) from None
    finally:
        outbox.close(0.0)


def add_to_run(
    folder: Path, tracking_uri: str, say: Callable[[Outbox], None], result: dict[str, Any], done: str
) -> None:
    """Tells a run's server more after its end; status and times stay as they are.

    Args:
        folder: The run's, or another one with the run's record in it.
        tracking_uri: As in `sync`.
        say: Appends to the run's journal.
        result: Of the caller's stage.
        done: What is safe whatever happens here, for the messages.

    Raises:
        UserError: Another process is writing the run.
        TrackingPending: The server has not received everything; it carries the result.
    """
    record = RunRecord.read(folder)
    try:
        outbox = open_outbox(folder, record, record.address(tracking_uri), lock_wait_s=LATE_LOCK_PATIENCE_S)
    except UserError as error:
        raise UserError(f"{done}, but {error}") from None
    outbox.start()
    say(outbox)
    if outbox.close(CLOSE_PATIENCE_S) > 0:
        raise TrackingPending(f"{done}, but {pending_message(folder, record.uri, outbox)}", result)


def registrations(folder: Path) -> list[Registered]:
    """The model versions that a run has made so far, from its journal's answers; contacts nobody."""
    answers = {seq: answer for seq, answer in read_results(folder) if "version" in answer}
    return [_registered(answer) for _, answer in sorted(answers.items())]


def _register(run: Run, name: str, staged: Path, tags: dict[str, str], *, promote: bool) -> Registered | None:
    run.set_tags({SHA256_TAG: tags[SHA256_TAG]})  # which run made a bundle, also where no version comes of it
    tags = {**tags, BYTES_TAG: str(sum(file.stat().st_size for file in staged.rglob("*") if file.is_file()))}
    seq = run.outbox.append("register", {"name": name, "path": str(staged), "tags": tags, "promote": promote})
    if seq is None or not run.outbox.wait(seq, REGISTER_PATIENCE_S):
        return None
    if (reason := run.outbox.refusal(seq)) is not None:
        shutil.rmtree(staged, ignore_errors=True)
        raise UserError(f"the server refuses to register {name!r}: {reason}")
    answer = run.outbox.result(seq)
    return _registered(answer) if answer is not None else None


def _registered(answer: Body) -> Registered:
    return from_record(Registered, answer, "the server's answer in the journal")


def _staging_folder(run: Run) -> Path:
    """A new folder in the run's, from which the journal uploads a version; removed after delivery."""
    root = run.folder / "staged"
    root.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(prefix="version-", dir=root))
