"""The commands beside the data's way: what says how things are, keeps them in order or repairs them."""

from __future__ import annotations

from typing import Any

from jobs.needs import STAGES
from jobs.options import Options, Result, facts, places, seed, stage, workspace_of
from rllib_ext.settings import MODES


def add_operations(commands: Any) -> None:
    """Adds every operation to the command line."""
    for add in (_probe, _doctor, _lineage, _gc, _sync):
        add(commands)


def _probe(commands: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import probe

        return probe.run(
            workspace_of(o), o.encoder, o.data, is_standardised=o.standardised, with_velocity=o.velocity, seed=o.seed
        )

    def present(r: Result) -> str:
        from jobs import probe

        return probe.present(r)

    details = (
        "Linear probes for the RAM variables of AtariARI (Anand et al. 2019), beside the published figures. The data:\n"
        "latentrl collect --protocol atariari --part probe --with-ram --resolution 210x160; the encoder\n"
        "is to have learned from --part pretrain."
    )
    p = stage(
        commands, "probe", "measure what an encoder knows of a game's state", details, run, present,
        driver_cpus=lambda o: 1,
    )  # fmt: skip
    p.add_argument("encoder", metavar="ENCODER", help="models:/NAME@alias, models:/NAME/3, runs:/ID/path or a folder")
    p.add_argument("--data", required=True, metavar="DIR", help="a random agent's frames with RAM")
    p.add_argument("--standardised", action="store_true", help="scale each latent to variance 1 (not as published)")
    p.add_argument("--velocity", action="store_true", help="measure the ball's velocity too (Pong, Breakout)")
    p.add_argument("--seed", type=seed, default=0, help="deals the episodes, draws the probes' weights (0)")
    places(p, uses_ray=False)


def _lineage(commands: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import lineage

        return lineage.run(workspace_of(o), o.asked)

    def present(r: Result) -> str:
        from jobs import lineage

        return lineage.present(r)

    details = (
        "Which data made this agent? Which agents use this encoder? Answered from the tracking server alone.\n"
        "RUN: an MLflow run id, a run's folder or name, the NAME of a --pipeline. MODEL: models:/NAME/3,\n"
        "models:/NAME@alias, a bundle's folder. Also a dataset's folder, address or digest."
    )
    p = stage(commands, "lineage", "say what was made from what", details, run, present)
    p.add_argument("asked", metavar="RUN_OR_MODEL", help="where to start")
    places(p, uses_ray=False)


def _gc(commands: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import gc

        return gc.run(workspace_of(o), delete=o.delete, finished=o.finished, versions=o.versions)

    def present(r: Result) -> str:
        from jobs import gc

        return gc.present(r)

    details = (
        "Says what it would remove, with sizes and why; --delete removes it. It takes checkpoints of finished runs\n"
        "that --resume does not take, what killed processes left, cached bundles that no run here uses and no alias\n"
        "means, and the files of deleted model versions. Runs at work or not yet delivered are left alone."
    )
    p = stage(commands, "gc", "remove what no alias, run or checkpoint needs", details, run, present)
    p.add_argument("--delete", action="store_true", help="remove; without it nothing is changed")
    p.add_argument(
        "--finished", action="store_true", help="also checkpoints that could make a finished training longer"
    )
    p.add_argument(
        "--versions", action="store_true", help="also model versions without alias that no run or version uses"
    )
    places(p, uses_ray=False)


def _sync(commands: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import sync

        return sync.run(workspace_of(o), o.run_name)

    details = "For runs that ended while the tracking server was away (exit code 3)."
    p = stage(commands, "sync", "deliver to MLflow what a run could not", details, run, lambda r: facts(r, *r))
    p.add_argument("run_name", metavar="RUN", help="a run's folder, its name, or its MLflow run id")
    places(p, uses_ray=False)


def _doctor(commands: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import doctor
        from jobs.needs import Wish, needs_of, stage_of

        names = "recipe config num_workers num_env_runners num_learners mode"
        wish = Wish(stage_of(o.recipe, o.stage), overrides=o.set, **{name: getattr(o, name) for name in names.split()})
        return doctor.run(workspace_of(o), storage=o.storage, needs=needs_of(wish), num_gpus=o.num_gpus)

    def present(r: Result) -> str:
        from jobs.doctor import present

        return present(r)

    details = (
        "Ray and its token, the versions and clocks of all nodes, home and storage written here and read there and\n"
        "vice versa, a run and an artifact in MLflow, and with a RECIPE or --for what a stage needs. Each check says\n"
        "how long it took and may take. Nothing that it writes stays. Without addresses it checks this machine.\n"
        "Exit code 0 all well (warnings allowed), 1 something is bad, 2 bad input."
    )
    p = stage(commands, "doctor", "check that a machine or a cluster is fit for the stages", details, run, present)
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="check what a recipe needs too (`latentrl recipes`)")
    p.add_argument("--for", dest="stage", choices=STAGES, help="the stage whose needs are checked; told from RECIPE")
    p.add_argument("--storage", help="another folder or address that data is to lie at (s3://...)")
    p.add_argument("--set", action="append", default=[], metavar="k=v", help="change one setting, as for the stage")
    p.add_argument("--config", metavar="FILE", help="take settings from a YAML file")
    p.add_argument("--num-workers", type=int, help="of collect (one a CPU that is free)")
    p.add_argument("--num-env-runners", type=int, help="of train (1)")
    p.add_argument("--num-learners", type=int, help="of train (0)")
    p.add_argument("--mode", choices=MODES, help="of train (frozen)")
    p.add_argument("--num-gpus", type=int, default=0, help="GPUs that are counted on (0)")
    places(p)
