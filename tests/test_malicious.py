"""Files that mean harm, wherever a loader takes what another person made: a clear error, and their code never runs."""

from __future__ import annotations

import ast
import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import mutations as m
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fuzz_files import SPEC
from fuzz_targets import TARGETS
from registry_toys import make_encoder, register
from sealing import reseal, reseal_dataset
from spoiling import Target
from toy_frames import toy_dataset

from jobs.cli import main
from jobs.recipes import train_recipe
from jobs.settings import load_resolved
from pipeline.artifact import load_encoder
from pipeline.errors import UserError
from pipeline.order import RowRange
from pipeline.registry import Run, resolve
from pipeline.source import Place, read_rows
from pipeline.store import FramesDataset
from rllib_ext.algorithm import LatentDQN
from rllib_ext.checkpoint import verify_checkpoint
from rllib_ext.config import LatentDQNConfig
from rllib_ext.replay_files import load_replay
from rllib_ext.state_files import load_state

pytest_plugins = ["registry_fixtures"]

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for room in ("pipeline", "rllib_ext", "jobs") for path in (ROOT / room).rglob("*.py"))
UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
RUNNERS = {
    *("eval", "exec", "compile", "torch.load", "np.load", "numpy.load", "torch.jit.load", "torch.hub.load"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "os.system", "os.popen", "mlflow.pyfunc.load_model"),
    *("ray.cloudpickle.loads", "ray.cloudpickle.load", "np.lib.format.read_array", "pd.read_pickle"),
}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the payloads would make."""
    return tmp_path / "marker"


def payload(marker: Path) -> bytes:
    return pickle.dumps(m.Payload(marker))


def torch_archive(marker: Path) -> bytes:
    """What `torch.save` writes: a zip archive around a pickle."""
    archive = io.BytesIO()
    torch.save({"weights": m.Payload(marker)}, archive)
    return archive.getvalue()


def object_array(marker: Path) -> bytes:
    """A .npy file of Python objects."""
    file = io.BytesIO()
    np.save(file, np.array([m.Payload(marker)], object), allow_pickle=True)
    return file.getvalue()


def python_tag(marker: Path) -> bytes:
    return f"!!python/object/apply:os.mkdir [{marker}]".encode()


POISONS: tuple[Callable[[Path], bytes], ...] = (payload, torch_archive, object_array, python_tag)


def test_the_payloads_are_live(tmp_path: Path) -> None:
    """Whoever unpickles them, or loads them as YAML that makes objects, finds a folder made: else nothing is shown."""
    pickle.loads(payload(tmp_path / "1"))
    torch.load(io.BytesIO(torch_archive(tmp_path / "2")), weights_only=False)
    np.load(io.BytesIO(object_array(tmp_path / "3")), allow_pickle=True)
    yaml.unsafe_load(python_tag(tmp_path / "4"))
    assert m.pickled_column(1, tmp_path / "5").to_pylist() == [None]
    assert {path.name for path in tmp_path.iterdir()} == set("12345")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_unpickle_or_run_what_it_reads(path: Path) -> None:
    """Nothing in the packages calls a loader that runs code: not even for a run's own state, which holds no pickle."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {node.module or ""} if isinstance(node, ast.ImportFrom) else {alias.name for alias in node.names}
            assert not {name.split(".")[0] for name in names} & UNPICKLERS, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in RUNNERS, f"line {node.lineno}: {called}"
            assert not any(
                keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False" for keyword in node.keywords
            )
            assert not any(keyword.arg == "shell" for keyword in node.keywords), f"line {node.lineno}: shell="
            if called == "yaml.load":
                assert path.name == "settings.py", f"line {node.lineno}"
                assert ast.unparse(node.args[1]) == "_PlainLoader", f"line {node.lineno}"


def target(name: str) -> Target:
    return next(target for target in TARGETS if target.name == name)


FILES = {
    "encoder": ("it/config.json", "it/model.safetensors", "it/preprocess.json", "it/stats.json", "it/README.md"),
    "policy": ("it/config.json", "it/q.safetensors", "it/preprocess.json", "it/encoder/model.safetensors"),
    "packed": ("packed",),
    "dataset": ("it/meta/manifest.json", "it/meta/episodes.parquet", "it/data/part-0.parquet"),
    "latents": ("it/meta/plan.json", "it/data/part-00000.parquet"),
    "config": ("config.yaml",),
    "runs": ("home/runs/evaluate-001/result.json", "home/runs/train-toy-frozen-001/config.yaml"),
    "journal": ("outbox.jsonl", "outbox.results.jsonl", "done.json"),
    "trainer-state": ("it/state.json", "it/state.safetensors", "it/replay/age.npy", "it/replay/replay.json", "it/run"),
    "training": ("it/model.safetensors", "it/optimizer.safetensors", "it/progress.json"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in FILES.items() for file in files])
@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.__name__)
def test_a_pickle_in_the_place_of_any_file(
    tmp_path: Path, marker: Path, name: str, file: str, poison: Callable[[Path], bytes]
) -> None:
    """Sealed with the right sums, so that nothing but the reading itself can refuse it."""
    folder = tmp_path / "made"
    folder.mkdir()
    target(name).make(folder)
    (folder / file).write_bytes(poison(marker))
    for sealed in (folder / "it/encoder", folder / "it"):
        if (sealed / "SHA256SUMS").is_file():
            reseal(sealed)
    if name == "dataset":
        reseal_dataset(folder / "it")
    try:
        target(name).load(folder)
    except UserError:
        pass
    else:
        assert name in ("runs", "journal", "config") or file.endswith(
            "README.md"
        )  # each complains to itself, or reads none
    assert not marker.exists()


def poisoned_dataset(folder: Path, marker: Path, column: str) -> Path:
    """A dataset one column of which is Ray's type for Python objects, manifest and all."""
    toy_dataset(folder, [20, 20])
    file = folder / ("meta/episodes.parquet" if column == "split" else "data/part-0.parquet")
    table = pq.read_table(file)
    at = table.schema.get_field_index(column)
    table = table.set_column(at, column, m.pickled_column(len(table), marker))
    held = {**(table.schema.metadata or {}), b"pandas": payload(marker)}
    pq.write_table(table.replace_schema_metadata(held), file)
    reseal_dataset(folder)
    return folder


@pytest.mark.parametrize("column", ["obs", "action", "split"])
def test_a_dataset_with_pickles_in_a_column(
    tmp_path: Path, marker: Path, column: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTRL_HOME", str(tmp_path / "home"))
    data = str(poisoned_dataset(tmp_path / "data", marker, column))
    assert main(["data", "check", data]) == 1
    assert main(["pretrain", "--data", data, "--register", "enc"]) == 2
    encoder = str(make_encoder(tmp_path / "enc"))
    assert main(["encode", "--data", data, "--encoder", encoder, "--out", str(tmp_path / "z")]) == 2
    assert ".parquet" in capfd.readouterr().err
    assert not marker.exists()


def test_a_file_that_is_replaced_after_the_dataset_was_checked(tmp_path: Path, marker: Path) -> None:
    """What a worker does with a file is safe by itself: between the check and the reading a store may change."""
    dataset = toy_dataset(tmp_path / "data", [20, 20])
    dataset.require_sound_files()
    place = Place.of(dataset)
    shutil.rmtree(tmp_path / "data")
    poisoned_dataset(tmp_path / "data", marker, "obs")
    with pytest.raises(UserError, match="column obs has type extension<ray"):
        read_rows(place, RowRange("data/part-0.parquet", 0, 10), ["obs"])
    assert not marker.exists()


def test_columns_of_tensors_whose_shape_is_a_pickle(tmp_path: Path, marker: Path) -> None:
    """Ray 2.49 to 2.54 kept a tensor's shape so, and unpickled it on opening a file; see that nothing here does."""
    import ray.data  # noqa: F401  registers the types

    dataset = toy_dataset(tmp_path / "data", [20, 20])
    file = tmp_path / "data/data/part-0.parquet"
    table = pq.read_table(file)
    at = table.schema.get_field_index("obs")
    held = {b"ARROW:extension:name": b"ray.data.arrow_tensor", b"ARROW:extension:metadata": payload(marker)}
    field = pa.field("obs", pa.list_(pa.uint8()), metadata=held)
    table = table.set_column(at, field, pa.array([[1, 2]] * len(table), pa.list_(pa.uint8())))
    pq.write_table(table, file)
    reseal_dataset(tmp_path / "data")
    with pytest.raises(UserError, match="unsound"):
        FramesDataset.open(dataset.uri).require_sound_files()
    with pytest.raises(UserError, match="damaged or unreadable"):
        read_rows(Place.of(dataset), RowRange("data/part-0.parquet", 0, 10), ["obs"])
    assert not marker.exists()


def test_yaml_that_makes_objects_or_never_ends(tmp_path: Path, marker: Path) -> None:
    bomb = "a: &a [x, x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijklmn", "bcdefghijklmno")
    )
    for content in (
        python_tag(marker).decode(),
        f"train: {{lr: {python_tag(marker).decode()}}}",
        bomb,
        "&a {train: *a}",
    ):
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(UserError, match="is not YAML"):
            train_recipe("dqn", config=str(tmp_path / "config.yaml"))
        with pytest.raises(UserError, match="is not YAML"):
            load_resolved(tmp_path)
    with pytest.raises(UserError, match="is not of type float"):
        train_recipe("dqn", overrides=[f"train.lr={python_tag(marker).decode()}"])
    assert not marker.exists()


def stranger_checkpoint(folder: Path, marker: Path) -> Path:
    """A run's own checkpoint, into which someone has put what RLlib and Tune would open, sums and run id right."""
    target("trainer-state").make(folder)
    names = ("algorithm_state.pkl", "class_and_ctor_args.pkl", "_dict_checkpoint.pkl", ".tune_metadata", "replay/x.pkl")
    for name in names:
        (folder / "it" / name).write_bytes(payload(marker))
    (folder / "it/rllib_checkpoint.json").write_text('{"type": "Algorithm", "checkpoint_version": "2.1"}')
    reseal(folder / "it")
    return folder / "it"


def test_pickles_beside_a_runs_own_state(tmp_path: Path, marker: Path) -> None:
    path = stranger_checkpoint(tmp_path, marker)
    algorithm = LatentDQN.__new__(LatentDQN)  # nothing of it is needed before the refusal
    algorithm.config = LatentDQNConfig().latent(run_id="mine")
    ways: tuple[Callable[[], object], ...] = (
        lambda: verify_checkpoint(path, "mine"),
        lambda: algorithm.restore_from_path(path),
        lambda: algorithm.restore(str(path)),
    )
    for way in ways:
        with pytest.raises(UserError, match="which no run of latentrl writes"):
            way()
    with pytest.raises(UserError, match="hold no configuration"):
        LatentDQN.from_checkpoint(path)
    assert not marker.exists()


def test_a_checkpoint_that_was_copied_linked_or_swapped(tmp_path: Path, marker: Path) -> None:
    """With another's id it is refused; with this run's id forged, it holds numbers, and they are all that is read."""
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        target("trainer-state").make(tmp_path / name)
    theirs = tmp_path / "theirs/it"
    (theirs / "run").write_text("theirs")
    reseal(theirs)
    with pytest.raises(UserError, match="written by run 'theirs', not by 'mine'"):
        verify_checkpoint(theirs, "mine")
    (theirs / "run").write_text("mine")
    with pytest.raises(UserError, match="the bytes of run have changed"):
        verify_checkpoint(theirs, "mine")
    reseal(theirs)
    verify_checkpoint(theirs, "mine")
    assert load_state(theirs, "state")["agent_steps"] == 3
    load_replay(theirs / "replay", SPEC)
    (theirs / "state.json").unlink()
    (theirs / "state.json").symlink_to(tmp_path / "mine/it/state.json")
    with pytest.raises(UserError, match=r"state\.json' is neither a file nor a folder"):
        verify_checkpoint(theirs, "mine")


def test_code_in_the_artifact_store(run: Run, bundle: Path, uri: str, name: str, tmp_path: Path, marker: Path) -> None:
    """Our loaders take the bundle out of a registered version; `mlflow.pyfunc.load_model` runs what lies beside it."""
    import mlflow

    version = register(run, bundle, name)
    [model] = Path(uri.removeprefix("sqlite:///")).parent.rglob("MLmodel")
    for file in model.parent.glob("*.py"):
        file.write_text(f"{file.read_text()}\nimport os\nos.mkdir({str(marker)!r})\n")
    (model.parent / "python_model.pkl").write_bytes(payload(marker))
    resolved = resolve(f"models:/{name}/{version.version}", uri, tmp_path / "cache")
    assert load_encoder(resolved.path).sha256 == version.sha256
    assert not marker.exists()
    mlflow.set_tracking_uri(uri)
    mlflow.pyfunc.load_model(f"models:/{name}/{version.version}")
    assert marker.exists()  # as docs/safety.md says
