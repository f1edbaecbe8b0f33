"""The stages' options and help, and what each prints when it is done. The stages themselves are imported when run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.options import Options, Result, facts, gathered, places, seed, share, stage, waiting, workspace_of
from pipeline.protocols import PARTS, PROTOCOLS, RESOLUTIONS
from rllib_ext.settings import MODES

EVALUATED = ("mean_return", "ci95_low", "ci95_high", "episodes", "human_normalised")


def add_stages(stages: Any) -> None:
    """Adds every stage to the command line, in the order of the data's way."""
    for add in (_collect, _data, _pretrain, _encode, _train, _evaluate, _report, _demo, _recipes):
        add(stages)


def recipe_options(parser: argparse.ArgumentParser, default: str, recipes: str) -> None:
    parser.set_defaults(recipes=recipes)
    parser.add_argument("recipe", nargs="?", default=default, help=f"name of a recipe (`latentrl recipes`; {default})")
    parser.add_argument(
        "--set", action="append", default=[], metavar="k=v", help="change one setting, e.g. train.lr=1e-4"
    )
    parser.add_argument("--config", metavar="FILE", help="take settings from a YAML file such as a run's config.yaml")


def _resume_options(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--resume", action="store_true", help="go on with the latest run of this name that was cut off")
    which.add_argument(
        "--resume-if-any",
        action="store_true",
        help="the same, or start one where there is none: for schedulers that repeat a command word for word",
    )


def settings_of(o: Options) -> Any:
    """The recipe of a command's options, with its file's and its own settings put in.

    A full path may be one that only a cluster's nodes have: it is read where the command runs.
    """
    from jobs import recipes

    find: Callable[..., Any] = getattr(recipes, o.recipes)
    is_elsewhere = o.config is not None and Path(o.config).is_absolute() and not Path(o.config).exists()
    return find(o.recipe, config=None if is_elsewhere else o.config, overrides=o.set)


def _game_is_known(o: Options) -> None:
    from pipeline.atari import preprocess_for

    preprocess_for(o.game, o.protocol)


def _collect(stages: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import collect

        names = "game frames out policy protocol resolution seed part with_ram num_workers epsilon overwrite"
        return collect.run(workspace_of(o), **{name: getattr(o, name) for name in names.split()})

    def present(r: Result) -> str:
        shown = facts(r, "dataset", "frames", "episodes", "bytes_per_frame", "frames_per_s", "digest")
        what = {"probe": "probe ENCODER --data", "pretrain": "pretrain probe --register NAME --data"}
        return f"{shown}\nnext: latentrl {what.get(r['part'], 'pretrain --register NAME --data')} {r['dataset']}"

    details = (
        "Ray workers play the game in lanes of their own and write Parquet; the same seed gives the same bytes\n"
        "whatever the number of workers. Exactly --frames rows are stored; the last episode of each lane is truncated."
    )
    p = stage(stages, "collect", "play a game and store its frames", details, run, present, check=_game_is_known)
    p.add_argument("--game", required=True, help="ALE id such as pong or ms_pacman; other spellings are understood")
    p.add_argument("--frames", required=True, type=int, help="rows to store")
    p.add_argument("--out", required=True, help="folder or address (s3://...) of the dataset")
    p.add_argument("--policy", default="random", help="random, sticky-random, or a policy's address (random)")
    p.add_argument(
        "--epsilon", type=share, default=0.05, help="share of random actions of a policy from an address (0.05)"
    )
    p.add_argument("--protocol", default="atari100k", help=f"{', '.join(PROTOCOLS)} (atari100k)")
    p.add_argument("--resolution", default="84x84", help=f"height x width: {', '.join(RESOLUTIONS)} (84x84)")
    p.add_argument("--seed", type=seed, default=0, help="decides the dataset (0)")
    p.add_argument("--part", choices=PARTS, help="of a benchmark's data: the parts share no emulator's seed, ever")
    p.add_argument("--with-ram", action="store_true", help="store the 128 bytes of RAM beside each frame (slower)")
    p.add_argument("--num-workers", type=int, help="collecting workers of one CPU each (one a CPU that is free)")
    p.add_argument("--overwrite", action="store_true", help="replace the dataset at --out")
    places(p, has_workers=True)


def _data(stages: Any) -> None:
    def info(o: Options) -> Result:
        from jobs import data

        return data.info(o.data)

    def check(o: Options) -> Result:
        from jobs import data

        return data.check(o.data)

    def verdict(r: Result) -> str:
        faults = [f"  bad: {fault}" for fault in r["errors"]]
        return (
            "\n".join(faults)
            if faults
            else f"sound: {r['frames']} frames in {r['episodes']} episodes, digest {r['digest']}"
        )

    root = stages.add_parser(
        "data", help="describe or verify a dataset", description="Describe or verify a frames dataset."
    )
    verbs = root.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=type(root))
    p = stage(verbs, "info", "say what a dataset holds", "Reads the manifest only.", info, lambda r: facts(r, *r))
    p.add_argument("data", metavar="DIR")
    details = "Checks every checksum, schema, row count and episode. Exit code 0 sound, 1 unsound, 2 not a dataset."
    p = stage(verbs, "check", "verify a dataset byte by byte", details, check, verdict, driver_cpus=lambda o: 1)
    p.add_argument("data", metavar="DIR")


def _pretrain(stages: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import pretrain

        names = "data register resume resume_if_any promote"
        return pretrain.run(workspace_of(o), settings_of(o), **{name: getattr(o, name) for name in names.split()})

    def present(r: Result) -> str:
        shown = facts(
            r,
            "model_uri",
            "aliases",
            "bits_per_dim",
            "elbo_nats",
            "active_units",
            "images_per_s",
            "seconds",
            "run_folder",
        )
        encoder = r["model_uri"] or r["bundle"]
        train = f"train --game {r['game']} --protocol {r['protocol']} --encoder {encoder} --mode frozen"
        then = f"probe {encoder} --data DIR" if r["protocol"] == "atariari" else train
        return f"{shown}{_champion(r)}\nnext: latentrl {then}"

    details = (
        "Ray Data streams the frames into Ray Train; the finished encoder becomes a version of --register in MLflow,\n"
        "with alias `latest`, and `champion` when its held-out bits/dim beats the champion's and it has not collapsed."
    )
    p = stage(
        stages, "pretrain", "train an encoder on stored frames and register it", details, run, present,
        check=settings_of,
    )  # fmt: skip
    recipe_options(p, "vae", "pretrain_recipe")
    p.add_argument("--data", required=True, metavar="DIR", help="a frames dataset")
    p.add_argument("--register", required=True, metavar="NAME", help="name of the registered model")
    p.add_argument("--promote", action="store_true", help="set alias champion whatever the present one's figures")
    _resume_options(p)
    gathered(p)
    places(p, has_workers=True)


def _champion(r: Result) -> str:
    """Why a registered encoder is not the champion, where its figures cannot say."""
    if r["has_heldout"] or not r["aliases"] or "champion" in r["aliases"]:
        return ""
    return (
        "\nnote: not champion, since no episode of this dataset is held out and bits per dim are of training frames; "
        "collect more, or make it champion with --promote"
    )


def _encode(stages: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import encode

        return encode.run(workspace_of(o), o.data, o.encoder, o.out, overwrite=o.overwrite)

    details = (
        "One row a transition, in the columns that RLlib's offline readers take.\n"
        "Run again, it goes on where it was cut off."
    )
    p = stage(
        stages, "encode", "turn frames into a dataset of latents", details, run,
        lambda r: facts(r, "dataset", "frames", "frames_per_s"),
    )  # fmt: skip
    p.add_argument("--data", required=True, metavar="DIR", help="a frames dataset")
    p.add_argument(
        "--encoder", required=True, metavar="URI", help="models:/NAME@alias, models:/NAME/3, runs:/ID/path or a folder"
    )
    p.add_argument("--out", required=True, metavar="DIR", help="folder or address of the dataset of latents")
    p.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    places(p, has_workers=True)


def _train(stages: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import train

        names = "game encoder mode agent_steps num_env_runners num_learners num_gpus_per_learner protocol seed register"
        given = {name: getattr(o, name) for name in (*names.split(), "resume", "resume_if_any")}
        return train.run(workspace_of(o), settings_of(o), **given)

    def check(o: Options) -> None:
        settings_of(o)
        _game_is_known(o)

    def present(r: Result) -> str:
        shown = facts(
            r,
            "model_uri",
            "policy",
            "agent_steps",
            "updates",
            "agent_steps_per_s",
            "steps_per_worker",
            "episode_return_mean",
            "run_folder",
        )
        return f"{shown}\nnext: latentrl evaluate {r['model_uri'] or r['policy']} --episodes 20"

    details = (
        "frozen:   latents are made on the rollout workers; the learner never sees a pixel (needs --encoder)\n"
        "finetune: the encoder learns too, at a rate of its own (needs --encoder)\n"
        "online:   encoder and decoder go on learning on their bound, from replayed frames, while Q learns on the\n"
        "          latents; from --encoder, or from nothing without it\n"
        "pixels:   the encoder's architecture from scratch, or the DQN paper's (q.torso=nature): the baselines"
    )
    p = stage(
        stages, "train", "learn to play by Q-learning, distributed by RLlib", details, run, present,
        check=check, driver_cpus=lambda o: int(o.num_learners == 0 or o.num_env_runners == 0),
    )  # fmt: skip
    recipe_options(p, "dqn", "train_recipe")
    p.add_argument("--game", required=True, help="ALE id such as pong")
    p.add_argument("--encoder", metavar="URI", help="models:/NAME@alias, models:/NAME/3, runs:/ID/path or a folder")
    p.add_argument("--mode", choices=MODES, default="frozen")
    p.add_argument("--agent-steps", type=int, default=100_000, help="decisions of the agent, over all workers (100000)")
    p.add_argument("--num-env-runners", type=int, default=1, help="remote rollout workers; 0: in this process (1)")
    p.add_argument("--num-learners", type=int, default=0, help="remote learners; 0: in this process (0)")
    p.add_argument("--num-gpus-per-learner", type=float, default=0, help="1: learn on a GPU; 0: on the CPU (0)")
    p.add_argument("--protocol", default="atari100k", help=f"{', '.join(PROTOCOLS)} (atari100k)")
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--register", metavar="NAME", help="name of the registered policy (GAME-agent)")
    _resume_options(p)
    gathered(p)
    places(p, has_workers=True)


def _evaluate(stages: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import evaluate

        return evaluate.run(workspace_of(o), o.policy, episodes=o.episodes, seed=o.seed, video=o.video)

    details = "Full games on raw points, greedy; the interval is a bootstrap over episodes (10,000 resamples, 95%)."
    p = stage(
        stages, "evaluate", "play whole games with a policy and score it", details, run,
        lambda r: facts(r, "policy", *EVALUATED, "run_folder"), driver_cpus=lambda o: 1,
    )  # fmt: skip
    p.add_argument("policy", metavar="POLICY", help="a policy's folder or registry address, or random:GAME")
    p.add_argument("--episodes", type=int, default=20)
    p.add_argument("--seed", type=seed, default=0, help="episode i starts from (seed, i) alone (0)")
    p.add_argument("--video", action="store_true", help="film one game, beside what its latent holds")
    gathered(p)
    places(p)


def _report(stages: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import report

        return report.run(workspace_of(o), o.asked, o.data)

    details = (
        "Self-contained; also an artifact of the run in MLflow. An encoder's page has sliders to turn its latents by,\n"
        "and the figures of `latentrl probe`."
    )
    p = stage(
        stages, "report", "make one HTML page of a run or an encoder", details, run,
        lambda r: f"  report  {r['path']}", driver_cpus=lambda o: 1,
    )  # fmt: skip
    p.add_argument(
        "asked",
        metavar="RUN_OR_ENCODER",
        help="a run's folder, its name, or its MLflow run id; or models:/NAME@alias, models:/NAME/3, a bundle's folder",
    )
    p.add_argument(
        "--data", metavar="DIR", help="frames to look at (an encoder's: those that it learned from, held out)"
    )
    places(p, uses_ray=False)


def _demo(stages: Any) -> None:
    def run(o: Options) -> Result:
        from jobs import demo

        return demo.run(
            o.out,
            tracking_uri=o.tracking_uri,
            ray_address=o.ray_address,
            wait_s=o.wait,
            seed=o.seed,
            overwrite=o.overwrite,
        )

    p = stage(
        stages, "demo", "run every stage on a real game, from frames to an agent that plays",
        "The tour of the project: jobs/demo.py is this command, stage by stage.", run, lambda r: str(r["table"]),
        driver_cpus=lambda o: 1,
    )  # fmt: skip
    p.add_argument("--out", default="latentrl-demo", help="folder for everything it makes (latentrl-demo)")
    p.add_argument("--seed", type=seed, default=0)
    p.add_argument("--overwrite", action="store_true", help="replace an earlier demo at --out")
    p.add_argument("--tracking-uri", help="MLflow server instead of a sqlite file under --out")
    p.add_argument("--ray-address", help="running Ray cluster (HOST:PORT or auto) instead of a local one")
    waiting(p)


def _recipes(stages: Any) -> None:
    def run(o: Options) -> Result:
        from jobs.recipes import described

        return described()

    def present(r: Result) -> str:
        import yaml

        return str(yaml.safe_dump(r, sort_keys=False)).rstrip()

    stage(
        stages, "recipes", "list the recipes and all their settings", "Each is a complete configuration.", run, present
    )
