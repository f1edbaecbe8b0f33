"""`LatentDQNConfig`: the settings of `LatentDQN` in RLlib's builder style, checked before anything starts."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.env_to_module import EnvToModulePipeline
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES

from pipeline import artifact
from pipeline.errors import UserError
from pipeline.machine import cores
from pipeline.schema import Preprocess
from rllib_ext.connectors import EncodeObservations, StackObservations
from rllib_ext.learner import LatentDQNLearner
from rllib_ext.module import SPEC_KEY, LatentQModule, QModuleSpec
from rllib_ext.networks import GridConvolution, NatureConvolutions
from rllib_ext.replay_spec import ReplaySpec
from rllib_ext.room import check_cluster, check_machine
from rllib_ext.runner import EnvFactory, LatentEnvRunner, atari_factory
from rllib_ext.settings import (
    CACHE,
    FINETUNE,
    FROZEN,
    MODES,
    NATURE,
    ONLINE,
    PIXELS,
    DQNSettings,
    ElboSettings,
    QConfig,
    replace_known,
)
from rllib_ext.shared_bundle import SharedBundle

if TYPE_CHECKING:
    from typing import Self

__all__ = ["DQNSettings", "ElboSettings", "LatentDQNConfig", "QConfig"]

# RLlib's own settings that LatentDQN honours. Every other one must keep its default.
_HONOURED = {
    "num_env_runners",
    "num_cpus_per_env_runner",
    "custom_resources_per_env_runner",
    "num_learners",
    "num_cpus_per_learner",
    "num_gpus_per_learner",
    "local_gpu_idx",
    "validate_env_runners_after_construction",
    "seed",
    "log_level",
    "log_sys_usage",
    "min_time_s_per_iteration",
    "callbacks_on_algorithm_init",
    "callbacks_on_train_result",
}
_MOST_LEARNER_THREADS = 4  # two were worth 1.5 on pixels, on two cores; more than four have not been measured
_MAX_SEED = 2**32 - 1  # of numpy's legacy generator, which RLlib seeds with the sum of seed and worker's index
# Attributes that latent(), training(), validate() or RLlib itself set.
_OWN = {
    "max_requests_in_flight_per_env_runner",
    *("mode", "preprocess", "encoder_path", "encoder_sha256", "encoder_config", "env_factory", "run_id"),
    *("settings", "q", "elbo", "z_shape", "bundle"),
    *("algo_class", "class", "_is_frozen", "in_evaluation", "_per_module_overrides", "policies", "simple_optimizer"),
}


class LatentDQNConfig(AlgorithmConfig):
    """Settings of a `LatentDQN` run.

    Example:
        config = (
            LatentDQNConfig()
            .latent(preprocess=preprocess_for("pong"), mode="frozen", encoder="path/of/a/bundle")
            .training(lr=1e-4, n_step=3)
            .env_runners(num_env_runners=1)
            .debugging(seed=0)
        )
        algorithm = config.build_algo()

    Attributes:
        MAY_CHANGE: Settings that may differ from those of the run that wrote the checkpoint which is restored.
    """

    MAY_CHANGE = frozenset(
        {"lr", "encoder_lr", "lr_decay_agent_steps", "adam_epsilon", "grad_clip", "precision", "runner_threads"}
        | {"learner_threads", "max_lead_fragments", "max_updates_per_step", "checkpoint_agent_steps"}
    )

    def __init__(self, algo_class: Any = None) -> None:
        """Complete defaults, except for the game's preprocessing and the encoder."""
        if algo_class is None:
            from rllib_ext.algorithm import LatentDQN

            algo_class = LatentDQN
        super().__init__(algo_class=algo_class)
        self.env_runner_cls = LatentEnvRunner
        self.framework_str = "torch"
        self.merge_env_runner_states = False
        self.broadcast_env_runner_states = False
        self.torch_skip_nan_gradients = True  # a check per parameter and update that costs more than it finds
        self.restart_failed_env_runners = True
        self.log_sys_usage = False  # a thread that reads /proc beside the learner
        self.mode = FROZEN
        self.preprocess: Preprocess | None = None
        self.encoder_path: Path | None = None
        self.encoder_sha256: str | None = None
        self.encoder_config: Any = None
        self.env_factory: EnvFactory = atari_factory
        self.run_id = ""
        self.settings = DQNSettings()
        self.q = QConfig()
        self.elbo = ElboSettings()
        self.z_shape: tuple[int, ...] = ()  # read from the encoder by validate()
        self.bundle: SharedBundle | None = None  # put into the object store by the algorithm
        self.training()

    def latent(self, **choices: Any) -> Self:
        """What is played and what Q reads.

        Args:
            choices: Any of `preprocess` (of the environment's frames), `mode` ("frozen", "finetune", "online" or
                "pixels"), `encoder` (folder of an encoder bundle; not for pixels, and in online mode as you like),
                `encoder_sha256` (what the bundle must hash to), `encoder_config` (the architecture of one that starts
                from nothing), `q` (a QConfig), `elbo` (ElboSettings of the modes whose encoder learns on its bound),
                `env_factory` (callable (preprocess, num_envs, num_threads) -> VectorAtari; the ALE by default) and
                `run_id` (written into checkpoints; only this run's are resumed).

        Raises:
            UserError: An unknown choice.
        """
        fields = {"encoder": "encoder_path"}
        of_encoder = ("encoder", "encoder_sha256", "encoder_config")
        known = ("preprocess", "mode", *of_encoder, "q", "elbo", "env_factory", "run_id")
        for name, value in choices.items():
            if name not in known:
                raise UserError(f"unknown choice {name!r} of LatentDQNConfig.latent; it takes {', '.join(known)}")
            setattr(self, fields.get(name, name), Path(value) if name == "encoder" and value is not None else value)
        return self

    def training(self, settings: DQNSettings | None = None, **changes: Any) -> Self:
        """Settings of the Q-learning: a whole DQNSettings, or single fields of it.

        Raises:
            UserError: An unknown field.
        """
        self.settings = replace_known(settings or self.settings, changes)
        for name, value in self._rllib_settings().items():
            setattr(self, name, value)
        return self

    def to_dict(self) -> dict[str, Any]:
        """For Tune: every setting of the Q-learning is a key of its own, so that a search can vary it."""
        known: dict[str, Any] = super().to_dict()
        settings: DQNSettings = known.pop("settings")
        return {**known, **vars(settings)}

    def update_from_dict(self, config_dict: dict[str, Any]) -> Self:
        """Takes over what `to_dict` gave, with changes.

        Raises:
            UserError: One of RLlib's network or optimizer settings, which LatentDQN does not read, was changed.
        """
        names = {field.name for field in dataclasses.fields(DQNSettings)}
        rest = {name: value for name, value in config_dict.items() if name not in names and name[:2] != "__"}  # Tune's
        for name in ("model", "optimizer"):
            if rest.pop(name, getattr(self, name)) != getattr(self, name):
                raise UserError(f"LatentDQN does not read RLlib's {name!r}; give latent(q=QConfig(...)) and training()")
        super().update_from_dict(rest)
        return self.training(**{name: value for name, value in config_dict.items() if name in names})

    def validate(self) -> None:
        """Refuses what cannot work, in one line, before any process is started.

        Raises:
            UserError: See there.
        """
        if self.in_evaluation:  # RLlib derives this copy and never uses it, since evaluation is refused
            super().validate()
            return
        self.check()
        check_cluster(self)
        super().validate()

    def check(self) -> None:
        """All of `validate` that needs no cluster.

        Raises:
            UserError: What cannot work.
        """
        self._refuse_unsupported()
        self._check_choices()
        self.settings.check(self.num_lanes)
        self.elbo.check()
        self._read_encoder()
        if self.q.grid_channels:
            GridConvolution(self.settings.stack, self.z_shape, self.q.grid_channels)
        check_machine(self)
        if not self._is_frozen:
            self.max_requests_in_flight_per_env_runner = math.ceil(self.settings.max_lead_fragments) + 1

    def identity(self) -> dict[str, Any]:
        """What a checkpoint and the algorithm that restores it must have in common, as plain values."""
        architecture = self.encoder_config if self.encoder_path is None else None
        settings = {f"train.{name}": v for name, v in vars(self.settings).items() if name not in self.MAY_CHANGE}
        q = {f"q.{name}": value for name, value in vars(self.q).items()}
        elbo = vars(self.elbo) if self.learns_bound else {}
        return {
            "mode": self.mode,
            "preprocess": dataclasses.asdict(self.preprocess) if self.preprocess else None,
            "encoder_sha256": self.encoder_sha256,
            "encoder_config": None if architecture is None else repr(architecture),
            "num_env_runners": self.num_env_runners,
            **q,
            **settings,
            **{f"elbo.{name}": value for name, value in elbo.items()},
        }

    def require_identity(self, theirs: dict[str, Any], what: str) -> None:
        """Refuses a checkpoint of another identity.

        Raises:
            UserError: Names what differs, with both values.
        """
        mine = self.identity()
        names = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
        if names:
            both = "; ".join(f"{name}: {theirs.get(name)!r} then, {mine.get(name)!r} now" for name in names)
            raise UserError(f"{what} was made with other settings ({both}); restore it with those it was made with")

    def replay_spec(self) -> ReplaySpec:
        """What the replay holds; after validate(), which reads the latents' length from the encoder."""
        assert self.preprocess is not None
        is_latent = self.mode == FROZEN
        return ReplaySpec(
            num_lanes=self.num_lanes,
            lane_rows=self.settings.replay_capacity // self.num_lanes,
            obs_shape=(math.prod(self.z_shape),) if is_latent else (self.preprocess.height, self.preprocess.width),
            obs_dtype="float16" if is_latent else "uint8",
            stack=self.settings.stack,
            n_step=self.settings.n_step,
            gamma=self.settings.gamma,
            priority_alpha=self.settings.priority_alpha,
            z_dim=math.prod(self.z_shape) if self.has_cache else 0,
            is_double=self.has_cache and self.settings.double,
        )

    @property
    def learns_bound(self) -> bool:
        """Whether the whole latent-variable model learns beside Q."""
        return self.mode == ONLINE or (self.mode == FINETUNE and self.elbo.in_finetune)

    @property
    def has_cache(self) -> bool:
        """Whether the replay keeps latents beside its frames."""
        return self.mode == ONLINE and self.elbo.q_reads == CACHE

    @property
    def reads_latents(self) -> bool:
        """Whether what is drawn for Q is latents already."""
        return self.mode == FROZEN or self.has_cache

    @property
    def cpus_needed(self) -> float:
        """Of Ray's count, by learners and runners; RLlib gives a remote learner one of its own, or a GPU."""
        each = not self.num_gpus_per_learner if self.num_cpus_per_learner == "auto" else self.num_cpus_per_learner
        return float(self.num_learners * each + self.num_env_runners * self.num_cpus_per_env_runner)

    @property
    def gpus_needed(self) -> float:
        """Of Ray's count; a learner in the driver takes one beside it."""
        return float(self.num_learners * self.num_gpus_per_learner)

    @property
    def num_lanes(self) -> int:
        """Environments of all runners."""
        return max(1, self.num_env_runners) * self.settings.envs_per_runner

    @property
    def learner_threads(self) -> int:
        """Threads of torch in each learner."""
        if self.settings.learner_threads or self.mode == FROZEN:
            return self.settings.learner_threads or 1
        return max(1, min(_MOST_LEARNER_THREADS, cores() // max(1, self.num_learners)))

    def _refuse_unsupported(self) -> None:
        if self.is_multi_agent:
            raise UserError("LatentDQN plays with one agent; drop multi_agent(...)")
        defaults = vars(LatentDQNConfig(algo_class=self.algo_class).training(self.settings))
        for name, value in vars(self).items():
            if name in _HONOURED or name in _OWN:
                continue
            if name not in defaults or _differs(value, defaults[name]):
                raise UserError(
                    f"LatentDQN does not support the setting {name}={value!r}; leave it at its default "
                    f"{defaults.get(name)!r}"
                )

    def _check_choices(self) -> None:
        seed, greatest = self.seed, _MAX_SEED - self.num_env_runners
        if seed is not None and not (isinstance(seed, int) and 0 <= seed <= greatest):
            raise UserError(f"the seed is {seed!r}; give a whole number from 0 to {greatest}, or None")
        if self.mode not in MODES:
            raise UserError(f"unknown mode {self.mode!r}; choose one of {', '.join(MODES)}")
        if self.preprocess is None:
            raise UserError("no preprocess given; pass latent(preprocess=preprocess_for(GAME))")
        self.q.check(self.mode)
        if self.mode == PIXELS and self.q.torso != NATURE and self.encoder_config is None:
            raise UserError("mode pixels needs an architecture; pass latent(encoder_config=...), or q.torso 'nature'")
        if self.mode == PIXELS and self.encoder_path is not None:
            raise UserError(f"mode pixels takes no encoder, and {self.encoder_path} was given; drop one of the two")
        if self.mode in (FROZEN, FINETUNE) and self.encoder_path is None:
            raise UserError(f"mode {self.mode} needs an encoder bundle; pass latent(encoder=FOLDER)")
        if self.mode == ONLINE and self.encoder_path is None and self.encoder_config is None:
            raise UserError("mode online needs latent(encoder=FOLDER), or latent(encoder_config=...) from nothing")
        self.elbo.check_mode(self.mode)

    def _read_encoder(self) -> None:
        assert self.preprocess is not None
        if self.q.torso == NATURE:
            torso = NatureConvolutions(self.settings.stack, self.preprocess.height, self.preprocess.width)
            self.z_shape, self.encoder_config = torso.z_shape, None
            return
        if self.encoder_path is None:
            built = self.encoder_config.for_frames(self.preprocess.height, self.preprocess.width)
            artifact.require_moderate(built)
            self.z_shape = built.latent_shape
            return
        encoder = artifact.load_encoder(
            self.encoder_path, expect_sha256=self.encoder_sha256, preprocess=self.preprocess
        )
        if not self._is_frozen:
            self.z_shape, self.encoder_sha256, self.encoder_config = encoder.z_shape, encoder.sha256, encoder.config

    def _rllib_settings(self) -> dict[str, Any]:
        """What our settings mean in RLlib's words."""
        return {
            "lr": self.settings.lr,
            "gamma": self.settings.gamma,
            "grad_clip": self.settings.grad_clip or None,
            "grad_clip_by": "global_norm",
            "num_envs_per_env_runner": self.settings.envs_per_runner,
            "rollout_fragment_length": self.settings.fragment_length,
            "train_batch_size_per_learner": self.settings.batch_size,
        }

    def get_state(self) -> dict[str, Any]:
        """Without the reference into the object store, which ends with the process."""
        return {**super().get_state(), "bundle": None}

    def get_default_learner_class(self) -> type[LatentDQNLearner]:
        """LatentDQNLearner."""
        return LatentDQNLearner

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """LatentQModule in this mode."""
        assert self.preprocess is not None
        spec = QModuleSpec(
            mode=self.mode,
            preprocess=self.preprocess,
            z_shape=self.z_shape,
            q=self.q,
            settings=self.settings,
            encoder_config=self.encoder_config,
            bundle=self.bundle,
        )
        return RLModuleSpec(module_class=LatentQModule, model_config={SPEC_KEY: spec})

    def build_env_to_module_connector(
        self, env: Any = None, spaces: Any = None, device: Any = None
    ) -> EnvToModulePipeline:
        """Frames to what Q reads: encoding (frozen mode only), then stacking; no episodes."""
        single = (
            spaces[INPUT_ENV_SINGLE_SPACES] if env is None else (env.single_observation_space, env.single_action_space)
        )
        pieces: list[Any] = [StackObservations(stack=self.settings.stack)]
        if self.mode == FROZEN:
            assert self.bundle is not None
            assert self.preprocess is not None
            z_dim = math.prod(self.z_shape)
            pieces.insert(0, EncodeObservations(bundle=self.bundle, preprocess=self.preprocess, z_dim=z_dim))
        return EnvToModulePipeline(input_observation_space=single[0], input_action_space=single[1], connectors=pieces)


def _differs(value: Any, default: Any) -> bool:
    return bool(value is not default and value != default)
