"""A pipeline's runs and versions on a real tracking server, made by the stages' own calls without the work between."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from registry_toys import make_encoder, register
from toy_frames import toy_dataset

from pipeline import bundle
from pipeline.registry import Registered, Tracking, register_policy
from pipeline.resolve import Resolved, resolve

NUMBERS = itertools.count()  # of all makers, so that no two runs, bundles or datasets are the same


@dataclass
class Maker:
    """Makes runs, each in a folder of its own."""

    uri: str
    folder: Path
    pipeline: str | None = None

    def run(self, stage: str, **more: Any):
        """An open run of a stage."""
        name = f"{stage}-{next(NUMBERS):03d}"
        return Tracking(self.uri, pipeline=self.pipeline).start_run(
            name, stage=stage, folder=self.folder / "runs" / name, **more
        )

    def dataset(self, **collection: Any) -> dict[str, Any]:
        """The facts of a small dataset."""
        root = self.folder / f"frames-{next(NUMBERS)}"
        facts = toy_dataset(root, [6 + next(NUMBERS), 4]).facts()
        return {**facts, **collection}

    def encoder(self, facts: dict[str, Any], name: str, bits: float = 1.0, **more: Any) -> tuple[str, Registered]:
        """The id of a pretraining run on the dataset, and the version it made."""
        with self.run("pretrain", **more) as run:
            run.log_dataset(facts, "pretrain")
            path = make_encoder(run.folder / "bundle", next(NUMBERS))
            registered = register(run, path, name, bits=bits, dataset=facts)
        return run.run_id, registered

    def agent(self, encoder: str, name: str, **more: Any) -> tuple[str, Path]:
        """The id of a run that learned on the encoder, and the policy that it made."""
        with self.run("train", **more) as run:
            seen_with = self.resolved(encoder)
            run.log_model_input("encoder", seen_with)
            run.log_params({"mode": "frozen"})
            policy = run.folder / "policy"
            with bundle.writing(policy) as draft:
                config = {"mode": "frozen", "encoder": {"sha256": seen_with.sha256}}
                (draft / "config.json").write_text(json.dumps(config))
                (draft / "q.safetensors").write_bytes(str(policy).encode())
            register_policy(run, policy, name, encoder=seen_with, tags={"mode": "frozen"})
        return run.run_id, policy

    def evaluation(self, policy: str, mean_return: float, **more: Any) -> str:
        """The id of a run that judged the policy."""
        with self.run("evaluate", **more) as run:
            run.log_model_input("policy", self.resolved(policy))
            run.log_metrics({"mean_return": mean_return}, 0)
        return run.run_id

    def resolved(self, address: str) -> Resolved:
        """What an address means now."""
        return resolve(address, self.uri, self.folder / "cache")
