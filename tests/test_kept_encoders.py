"""Encoders that a run keeps on its way: which stay, that they change nothing else, and the page that shows them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from rl_toys import make_encoder
from test_train_job import RECIPE, TINY

import jobs.report
from jobs import gc, train
from jobs.keeping import KeptEncoders
from jobs.kept_encoders import compared_frames, evenly, kept_encoders
from jobs.workspace import Workspace
from pipeline.artifact import load_model, load_stats
from pipeline.atari import preprocess_for
from pipeline.bundle import sha256_of
from pipeline.errors import UserError
from pipeline.similarity import linear_cka
from rllib_ext.settings import ElboSettings

ELBO = ElboSettings(
    updates_per_agent_step=0.2, warmup_agent_steps=32, batch_size=16, publish_updates=4, scratch_updates=10, lr=1e-3
)
TURNS = replace(RECIPE, train=RECIPE.train.replace(synchronous=True, checkpoint_agent_steps=64), elbo=ELBO)


@pytest.fixture(scope="module", autouse=True)
def _ray_session():
    torch.set_num_threads(1)
    ray.init("local", num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def run(workspace, encoder=None, **changes):
    settings = {"game": "pong", "encoder": encoder, "mode": "online", "agent_steps": 256, "num_env_runners": 0}
    return train.run(workspace, changes.pop("recipe", TURNS), **{**settings, **changes})


def listed(result) -> dict[int, str]:
    return {steps: sha256_of(path) for steps, path in kept_encoders(Path(result["run_folder"]))}


def weights(result) -> list[tuple[int, bytes]]:
    """Of all but the card, which names the run: what the kept encoders are."""
    found = kept_encoders(Path(result["run_folder"]))
    return [(n, *((path / f).read_bytes() for f in ("model.safetensors", "stats.json"))) for n, path in found]


# --- which stay


@given(st.sets(st.integers(0, 2_000), min_size=1), st.integers(1, 300), st.integers(3, 12))
def test_thinning_keeps_first_and_last_and_little_between(steps, every, most):
    staying = evenly(steps, every, most)
    assert len(staying) <= most
    assert set(staying) <= steps
    assert {min(steps), max(steps)} <= set(staying)
    assert evenly(staying, every, most) == staying


@given(st.integers(1, 100), st.integers(3, 12), st.integers(1, 50))
def test_those_that_stay_are_even_whenever_it_is_done(num_checkpoints, most, every):
    now_and_then: list[int] = []
    for number in range(num_checkpoints):
        now_and_then = evenly([*now_and_then, number * every], every, most)
    assert now_and_then == evenly([number * every for number in range(num_checkpoints)], every, most)
    assert len(set(np.diff(now_and_then)[:-1])) <= 1
    assert len(now_and_then) >= min(num_checkpoints, most // 2)


# --- how alike


def test_alignment_is_one_of_a_rotation_and_falls_with_noise():
    torch.manual_seed(0)
    latents, noise = torch.randn(500, 6), torch.randn(500, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6))[0]
    alike = [linear_cka(latents, 3 * (latents + share * noise) @ rotation + 5) for share in (0.0, 0.5, 2.0)]
    assert alike[0] == pytest.approx(1.0)
    assert 1 > alike[1] > alike[2] > 0
    assert linear_cka(latents, noise) < 0.05
    assert np.isnan(linear_cka(latents, torch.ones(500, 3)))
    with pytest.raises(ValueError, match="shapes"):
        linear_cka(latents, noise[1:])


# --- a run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workspace:
    return Workspace.at(str(tmp_path_factory.mktemp("kept") / "home"))


@pytest.fixture(scope="module")
def whole(place):
    return run(place)


def test_a_run_leaves_them_in_order_and_they_see_differently(whole):
    found = kept_encoders(Path(whole["run_folder"]))
    steps = [agent_steps for agent_steps, _ in found]
    assert steps == [96, 128, 192, 256], "when learning began, at checkpoints, at the end"
    assert sha256_of(found[-1][1]) == whole["encoder_bundle_sha256"]
    early, late = compared_frames(Path(whole["run_folder"]), preprocess_for("pong"))
    assert early.shape[1:] == late.shape[1:] == (84, 84)
    assert 96 <= len(early) <= len(late)
    assert not np.array_equal(early[:4], late[:4])
    frames = torch.from_numpy(np.concatenate([early[:2], late[:2]]))
    models = [load_model(path) for _, path in found]
    seen = [model.decode(model.features(frames)).mean.detach() for model in models]
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(seen))
    assert all(len(load_stats(path).mean) == TINY.z_dim for _, path in found)


def test_a_run_is_the_same_without_them(whole, place, monkeypatch):
    monkeypatch.setattr(KeptEncoders, "keep", lambda self, algorithm: None)
    without = run(place)
    assert not listed(without)
    parts = [Path(result["policy"]) / "q.safetensors" for result in (whole, without)]
    assert parts[0].read_bytes() == parts[1].read_bytes()
    made = [Path(result["encoder"]) / "model.safetensors" for result in (whole, without)]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_a_resumed_run_has_those_of_an_uninterrupted_one(whole, place, monkeypatch):
    step = train._Session._step

    def killed(session, algorithm):
        if algorithm.agent_steps >= 224:
            session._encoders.keep(algorithm)  # after the last checkpoint: played again, and not there then
            folder = session._folder / "encoders"
            (folder / ".agent-steps-000000224-half").mkdir()
            raise KeyboardInterrupt
        return step(session, algorithm)

    monkeypatch.setattr(train._Session, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(place)
    folder = place.latest_run_folder("train-pong-online")
    assert [steps for steps, _ in kept_encoders(folder)] == [96, 128, 192, 224]
    left = [item["what"] for item in gc.run(place)["items"] if folder.name in item["what"]]
    assert left == [f"runs/{folder.name}/encoders/.agent-steps-000000224-half"]
    monkeypatch.setattr(train._Session, "_step", step)
    resumed = run(place, resume=True)
    assert weights(resumed) == weights(whole)
    assert sorted(path.name for path in (folder / "encoders").glob(".*")) == []
    pictures = [Path(result["run_folder"]) / "encoders" / "late.png" for result in (whole, resumed)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_finetune_keeps_them_with_the_bound_only_and_frozen_none(place, tmp_path):
    encoder = str(make_encoder(tmp_path / "encoder", preprocess_for("pong"), TINY, standardise=False))
    with_bound = replace(TURNS, elbo=replace(ELBO, in_finetune=True, scratch_updates=ElboSettings.scratch_updates))
    assert list(listed(run(place, encoder, mode="finetune", recipe=with_bound, agent_steps=128))) == [96, 128]
    frozen = run(place, encoder, mode="frozen", recipe=replace(TURNS, elbo=ElboSettings()), agent_steps=128)
    assert not listed(frozen)
    page = Path(jobs.report.run(place, Path(frozen["run_folder"]).name)["path"]).read_text()
    assert "How the representation changed" not in page


# --- the page


def test_the_page_shows_them_beside_each_other(whole, place):
    folder = Path(whole["run_folder"])
    found = kept_encoders(folder)
    page = Path(jobs.report.run(place, folder.name)["path"]).read_text()
    assert "How the representation changed" in page
    names = [f"<h3>{steps} agent steps</h3>" for steps, _ in found]
    assert [page.index(name) for name in names] == sorted(page.index(name) for name in names)
    assert "None of these encoders has been probed. Type: for encoder in" in page
    assert f"{folder}/encoders/agent-steps-*; do latentrl probe" in page
    assert "--protocol atariari --part probe --frames 50000 --resolution 84x84 --with-ram --out DIR" in page
    assert page.count("CKA with the last") == len(found)
    assert "<dd>1.000</dd>" in page
    assert "no finished encoder" not in page
    for label in ("bound on the newest frames", "on the oldest that are held", "of an earlier version", "made anew"):
        assert label in page
    copies = [path for path in place.home.rglob("report.html") if whole["run_id"] in str(path)]
    assert [copy.read_text() for copy in copies] == [page]


def test_probes_of_them_stand_on_the_page(whole, place):
    folder = Path(whole["run_folder"])
    (_, first), *_, (_, last) = kept_encoders(folder)
    for path, f1 in ((first, 0.25), (last, 0.75)):
        record = place.encoders / sha256_of(path)[:16] / "probe" / "posterior-mean-0-0.json"
        record.parent.mkdir(parents=True)
        figures = {"f1": f1, "f1_by_category": {"agent": f1}, "f1_by_variable": {"player_y": f1}, "accuracy": f1}
        facts = {"game": "pong", "resolution": "84x84", "features": "posterior mean", "digest": "0" * 64, "seed": 0}
        record.write_text(json.dumps({**figures, **facts, "test_frames": 10}))
    page = Path(jobs.report.run(place, folder.name)["path"]).read_text()
    assert "<tr><td>player y</td><td>0.25</td><td>0.75</td></tr>" in page
    assert "Some of these encoders have not been probed." in page
    assert "learned under protocol atari100k" in page


def test_a_damaged_one_and_a_link_are_told_in_a_line(whole, place):
    _, path = kept_encoders(Path(whole["run_folder"]))[1]
    weights_file = path / "model.safetensors"
    content = weights_file.read_bytes()
    weights_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"the bytes of model\.safetensors have changed"):
        jobs.report.run(place, Path(whole["run_folder"]).name)
    weights_file.write_bytes(content)
    path.rename(elsewhere := place.home / path.name)
    path.symlink_to(elsewhere)
    with pytest.raises(UserError, match="do not trust its maker"):
        jobs.report.run(place, Path(whole["run_folder"]).name)
    path.unlink()
    elsewhere.rename(path)
