"""Where everything lies: one visible folder for runs, data, the tracking database and its artifacts."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UserError
from pipeline.untrusted import read_json, short

HOME_VARIABLE = "LATENTRL_HOME"
PIPELINE_VARIABLE = "LATENTRL_PIPELINE"
DEFAULT_HOME = "latentrl-runs"
JOB_VARIABLE = "LATENTRL_JOB"  # the name of the job that this process is the driver of

# What lies in a run's folder.
RESULT_FILE = "result.json"  # what the stage gave at its end; absent until then
BUNDLE_FOLDER = "bundle"  # pretrain: the encoder
CHECKPOINTS_FOLDER = "checkpoints"  # pretrain: Ray Train's
POLICY_FOLDER = "policy"  # train: the agent
CHECKPOINT_FOLDER = "checkpoint"  # train: learner and replay


@dataclass(frozen=True)
class Workspace:
    """The places of a project.

    Attributes:
        home: Absolute path of the folder that holds everything.
        tracking_uri: MLflow's address; by default a sqlite file under `home`.
        ray_address: A running Ray cluster, or None for a local one that the command starts and stops.
        pipeline: Name of the MLflow run under which the stages' runs are gathered, if they are.
        wait_s: How long a stage waits for the cluster's room; see `room.require`.
    """

    home: Path
    tracking_uri: str
    ray_address: str | None = None
    pipeline: str | None = None
    wait_s: float | None = None

    @classmethod
    def at(
        cls,
        home: str | None,
        tracking_uri: str | None = None,
        ray_address: str | None = None,
        pipeline: str | None = None,
        wait_s: float | None = None,
    ) -> Workspace:
        """Builds a workspace from what the user gave; the folder is made when something is first written.

        Raises:
            UserError: `home` exists and is no folder, or this is a cluster's job and it is not said.
        """
        if os.environ.get(JOB_VARIABLE) and not home and not os.environ.get(HOME_VARIABLE):
            raise UserError(
                f"neither --home nor the nodes' {HOME_VARIABLE} says where runs go, and this job's folder is lost with "
                "its node; give --home, a folder that every node sees"
            )
        path = Path(home or os.environ.get(HOME_VARIABLE) or DEFAULT_HOME).expanduser().absolute()
        if path.exists() and not path.is_dir():
            raise UserError(f"--home {path} is a file; name a folder")
        gathered = pipeline or os.environ.get(PIPELINE_VARIABLE) or None
        return cls(path, tracking_uri or f"sqlite:///{path}/mlflow.db", ray_address, gathered, wait_s)

    @property
    def runs(self) -> Path:
        """Folder with one folder a run."""
        return self.home / "runs"

    @property
    def encoders(self) -> Path:
        """Folder with pages and probes of encoders whose pretraining is not in this home, one folder an encoder."""
        return self.home / "encoders"

    @property
    def cache(self) -> Path:
        """Folder with bundles that came from the registry."""
        return self.home / "cache"

    def new_run_folder(self, name: str) -> Path:
        """Makes the next folder NAME-001, NAME-002, ... of that name.

        Raises:
            UserError: The home cannot be written.
        """
        number = max([self._number(path) for path in self._folders(name)], default=0)
        while True:
            number += 1
            folder = self.runs / f"{name}-{number:03d}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(f"cannot write to {self.home} ({error.strerror}); name another --home") from None
            return folder

    def latest_run_folder(self, name: str) -> Path | None:
        """The run folder with the highest number of that name, or None."""
        return max(self._folders(name), key=self._number, default=None)

    def find_run(self, run: str) -> Path:
        """A run's folder from its path, its name (`train-pong-001`), or its MLflow run id.

        Raises:
            UserError: There is none.
        """
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # of a text that cannot be a path
            places = [
                Path(run).expanduser().absolute(),
                *([self.runs / run, self.encoders / run] if "/" not in run else []),
            ]
            for candidate in places:
                if (candidate / "run.json").is_file():
                    return candidate
        for record in sorted(self.runs.glob("*/run.json")):
            with contextlib.suppress(UserError):  # a damaged one is not the one that is looked for
                if read_json(record, str(record)).get("run_id") == run:
                    return record.parent
        known = ", ".join(sorted(p.parent.name for p in self.runs.glob("*/run.json"))[-3:]) or "none yet"
        raise UserError(f"there is no run {short(run)} under {self.runs}; the latest ones: {known}")

    def _folders(self, name: str) -> list[Path]:
        pattern = re.compile(rf"{re.escape(name)}-\d{{3,}}$")
        return [path for path in self.runs.glob(f"{name}-*") if pattern.match(path.name)]

    @staticmethod
    def _number(path: Path) -> int:
        return int(path.name.rsplit("-", 1)[1])
