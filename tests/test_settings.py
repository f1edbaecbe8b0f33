"""Recipes: overrides are typed, unknown keys name those like it, what is saved can be read back."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs.recipes import PRETRAIN_RECIPES, TRAIN_RECIPES, pretrain_recipe, train_recipe
from jobs.settings import known_keys, resolve, save_resolved, to_dict
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.lr=1e-4", "lr", 1e-4),
        ("train.lr=1", "lr", 1.0),
        ("train.batch_size=64", "batch_size", 64),
    ],
)
def test_override_takes_the_declared_type(override: str, key: str, value: float) -> None:
    changed = getattr(train_recipe("dqn", overrides=[override]).train, key)
    assert changed == value
    assert type(changed) is type(value)


def test_override_of_a_tuple_and_a_flag() -> None:
    recipe = train_recipe("dqn", overrides=["q.hidden=[64, 32]", "q.layer_norm=false"])
    assert recipe.q.hidden == (64, 32)
    assert recipe.q.layer_norm is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1", r"unknown setting 'train.learning_rate'; did you mean train\.\w+"),
        ("lr=1", r"unknown setting 'lr'; did you mean train\.lr, elbo\.lr\?"),
        ("xyzzy=1", r"unknown setting 'xyzzy'; there are: name, .* \(`latentrl recipes` shows all\)$"),
        ("train=3", r"unknown setting 'train'"),
        ("train.lr.x=3", r"unknown setting 'train.lr.x'"),
        ("train.batch_size=ten", r"train.batch_size = 'ten' is not of type int"),
        ("train.batch_size=1.5", r"is not of type int"),
        ("train.batch_size=true", r"is not of type int"),
        ("q.layer_norm=1", r"is not of type bool"),
        ("train.lr", r"has no '='"),
    ],
)
def test_wrong_override_is_one_clear_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_recipe("dqn", overrides=[override])


def test_values_that_the_settings_refuse_are_user_errors() -> None:
    with pytest.raises(UserError, match=r"model.beta = '-1'"):
        pretrain_recipe("vae", overrides=["model.beta=-1"])


def test_unknown_recipe_names_what_is_like_it_or_all() -> None:
    with pytest.raises(UserError, match=r"did you mean vae\?$"):
        pretrain_recipe("vea")
    with pytest.raises(UserError, match=f"unknown recipe 'xyzzy'; there are: {', '.join(PRETRAIN_RECIPES)}$"):
        pretrain_recipe("xyzzy")


@pytest.mark.parametrize("recipe", [*PRETRAIN_RECIPES.values(), *TRAIN_RECIPES.values()], ids=lambda r: r.name)
def test_what_is_saved_reads_back(recipe, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_resolved(tmp_path, recipe, "stage")
    assert resolve(recipe, config=str(tmp_path / "config.yaml")) == recipe
    assert {"git_commit", "ray", "torch"} <= set(yaml.safe_load((tmp_path / "versions.yaml").read_text()))


def test_known_keys_cover_the_recipe() -> None:
    recipe = TRAIN_RECIPES["dqn"]
    assert {"train.lr", "q.hidden", "model.z_dim", "name"} <= set(known_keys(recipe))
    assert set(to_dict(recipe)) == {"name", "q", "train", "model", "elbo"}


def test_config_file_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read --config"):
        train_recipe("dqn", config=str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("train: [")
    with pytest.raises(UserError, match="is not YAML"):
        train_recipe("dqn", config=str(tmp_path / "bad.yaml"))
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="holds a list"):
        train_recipe("dqn", config=str(tmp_path / "list.yaml"))
