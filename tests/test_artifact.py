"""Encoder bundles: what is saved is what is loaded, and nothing else is."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile

import pytest
import torch
from toy_frames import toy_frames, toy_preprocess

from pipeline import bundle, models
from pipeline.artifact import (
    LatentStats,
    from_scratch,
    load_encoder,
    load_model,
    pack,
    save_encoder,
    unpack,
    weights_sha256,
)
from pipeline.errors import UserError
from pipeline.models.vae import VAESettings

SETTINGS = VAESettings(z_dim=4, patch=2, widths=(8, 8))
STATS = LatentStats.from_moments(torch.randn(4), torch.tensor([0.5, 2.0, 1e-6, 0.02]), torch.rand(4))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return models.build(SETTINGS.for_frames(12, 10)).eval()


@pytest.fixture
def path(tmp_path, model):
    save_encoder(tmp_path / "bundle", model, STATS, toy_preprocess(), {"Seed": 0})
    return tmp_path / "bundle"


FRAMES = torch.from_numpy(toy_frames(300, 12, 10))


def test_loaded_equals_saved(path, model):
    encoder = load_encoder(path)
    expected = (model.features(FRAMES) - torch.tensor(STATS.mean)) / torch.tensor(STATS.scale)
    torch.testing.assert_close(encoder.encode(FRAMES), expected, rtol=1e-5, atol=1e-6)
    assert encoder.stats == STATS
    assert encoder.preprocess == toy_preprocess()
    assert encoder.config == model.config
    assert not encoder.training
    loaded = load_model(path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_the_same_content_has_the_same_hash(path, model, tmp_path):
    again = save_encoder(tmp_path / "again", model, STATS, toy_preprocess(), {"Seed": 0})
    assert again == bundle.sha256_of(path) == load_encoder(path).sha256


def test_inactive_dimensions_are_not_blown_up():
    assert STATS.active == (True, True, False, True)
    assert STATS.num_active == 3
    assert STATS.scale[2] == pytest.approx(0.1)
    assert STATS.scale[1] == pytest.approx(2**0.5)


def test_a_bundle_keeps_the_hashes_of_files_that_it_links_and_of_no_others(tmp_path):
    with bundle.writing(tmp_path / "earlier") as draft:
        for name in ("linked", "changed", "copied"):
            (draft / name).write_text(name)
    for name in ("changed", "copied"):
        (tmp_path / "earlier" / name).write_text("other bytes")
    with bundle.writing(tmp_path / "new", tmp_path / "earlier") as draft:
        for name in ("linked", "changed"):
            (draft / name).hardlink_to(tmp_path / "earlier" / name)
        (draft / "copied").write_text("bytes of its own")
        (draft / "fresh").write_text("fresh")
    with pytest.raises(UserError, match=r"bundle .*new: the bytes of changed have changed"):
        bundle.verify(tmp_path / "new")
    (tmp_path / "new" / "changed").write_text("changed")  # what it held when it was sealed
    bundle.verify(tmp_path / "new")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "stats.json", "preprocess.json", "README.md"])
def test_a_changed_byte_is_refused_and_its_file_named(path, name):
    content = bytearray((path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"the bytes of {name} have changed"):
        load_encoder(path)


def test_a_missing_and_an_added_file_are_refused(path):
    (path / "extra.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"extra\.bin is not listed"):
        load_encoder(path)
    (path / "extra.bin").unlink()
    (path / "stats.json").unlink()
    with pytest.raises(UserError, match=r"stats\.json is missing"):
        load_encoder(path)


def test_another_bundle_than_expected_is_refused(path):
    with pytest.raises(UserError, match="not 0000 as expected"):
        load_encoder(path, expect_sha256="0000")


def test_other_preprocessing_is_refused_with_both_values(path):
    with pytest.raises(UserError, match=r"game.*'toy'.*'pong'"):
        load_encoder(path, preprocess=toy_preprocess(game="pong"))


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_encoder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a bundle"):
        load_encoder(tmp_path / "empty")


def test_a_bundle_of_another_version_is_refused(path):
    record = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**record, "depth": 3}))
    _reseal(path)
    with pytest.raises(UserError, match="unknown or missing keys"):
        load_encoder(path)


def _reseal(path):
    with bundle.writing(path.with_name("resealed")) as draft:
        for file in path.iterdir():
            if file.name != bundle.SUMS_FILE:
                (draft / file.name).write_bytes(file.read_bytes())
    for file in path.iterdir():
        file.unlink()
    path.rmdir()
    path.with_name("resealed").rename(path)


def test_an_existing_folder_is_not_overwritten(path, model):
    with pytest.raises(UserError, match="exists already"):
        save_encoder(path, model, STATS, toy_preprocess(), {})


def test_a_failed_write_leaves_nothing(tmp_path, model):
    with pytest.raises(AttributeError):
        save_encoder(tmp_path / "b", model, None, toy_preprocess(), {})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_packed_and_unpacked_is_the_same(path, tmp_path):
    blob = pack(path)
    assert blob == pack(path)
    there = unpack(blob, tmp_path / "there", bundle.sha256_of(path))
    assert weights_sha256(load_encoder(there)) == weights_sha256(load_encoder(path))


def test_a_changed_package_is_refused_and_leaves_nothing(path, tmp_path):
    blob = bytearray(pack(path))
    blob[len(blob) // 2] ^= 1
    with pytest.raises(UserError):
        unpack(bytes(blob), tmp_path / "there", bundle.sha256_of(path))
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil"])
def test_a_package_cannot_write_elsewhere(tmp_path, name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(UserError, match="leads elsewhere"):
        unpack(buffer.getvalue(), tmp_path / "in" / "there", "0")
    assert not (tmp_path / "evil").exists()


def test_from_scratch_has_the_same_architecture_and_is_trainable():
    encoder = from_scratch(SETTINGS, toy_preprocess())
    assert encoder.sha256 == ""
    encoder(FRAMES[:4]).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_weights_hash_moves_with_a_single_bit(path):
    encoder = load_encoder(path)
    before = weights_sha256(encoder)
    assert before == weights_sha256(load_encoder(path))
    with torch.no_grad():
        next(encoder.parameters()).view(-1)[0].add_(1e-6)
    assert weights_sha256(encoder) != before


def test_encoding_in_batches_equals_encoding_at_once(path):
    encoder = load_encoder(path)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode(FRAMES), encoder(FRAMES), rtol=1e-4, atol=1e-5)


def test_loading_needs_neither_ray_nor_mlflow_nor_pickle(path):
    code = (
        "import sys, pickle\n"
        "def refuse(*a, **k): raise AssertionError('unpickled')\n"
        "from pipeline.artifact import load_encoder\n"
        "import torch\n"
        "pickle.load = pickle.loads = pickle.Unpickler = refuse\n"
        f"load_encoder({str(path)!r}).encode(torch.zeros(1, 12, 10, dtype=torch.uint8))\n"
        "print([m for m in ('ray', 'mlflow') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_cells_of_a_channel_have_the_mean_and_scale_of_all_their_values() -> None:
    values = torch.randn(200, 3, 2, 5) * torch.rand(3, 2, 5) + torch.randn(3, 2, 5)
    mean, variance = values.mean(0).flatten(), values.var(0, unbiased=False).flatten()
    stats = LatentStats.from_moments(mean, variance, torch.zeros(30), (3, 2, 5))
    of_channel = values.transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(stats.mean), of_channel.mean(1).repeat_interleave(10))
    torch.testing.assert_close(torch.tensor(stats.scale), of_channel.std(1, unbiased=False).repeat_interleave(10))
    assert stats.active == tuple((variance > 0.01).tolist())
    flat = LatentStats.from_moments(mean, variance, torch.zeros(30))
    torch.testing.assert_close(torch.tensor(flat.mean), mean)
    torch.testing.assert_close(torch.tensor(flat.scale), variance.sqrt().clamp(min=0.1))
