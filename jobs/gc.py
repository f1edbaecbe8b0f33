"""`latentrl gc`: removes checkpoints, leftovers and models that nothing needs; says first what it would remove."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jobs.garbage import Findings, bytes_on_disk, run_folders, sweep_cache, sweep_run, used_bundles, used_just_now
from jobs.workspace import Workspace
from pipeline.errors import UserError
from pipeline.records import Records
from pipeline.unused import Registry, StoredModel

MAX_SHOWN = 40
UNITS = ("bytes", "KB", "MB", "GB", "TB")


def run(
    workspace: Workspace, *, delete: bool = False, finished: bool = False, versions: bool = False
) -> dict[str, Any]:
    """Finds what nothing needs any more, and removes it on request.

    Nothing is touched of a run that a process writes or whose journal is not delivered, nor anything that this program
    did not make. Datasets, bundles in runs' folders, metrics and results stay in any case.

    Args:
        workspace: Whose home it is, and which tracking server its runs and models are on.
        delete: Remove; otherwise nothing is changed.
        finished: Also the checkpoints of finished trainings that `--resume` could still make longer.
        versions: Also registered versions that no alias means and no run or version uses.

    Returns:
        home, is_removed (whether things went), items (kind, what, bytes, why), bytes of all of them, kept (what, bytes,
        why), hints, errors.

    Raises:
        UserError: There is no such home.
    """
    if not workspace.home.is_dir():
        raise UserError(f"there is no folder {workspace.home}; name another --home")
    home = Workspace(workspace.home.resolve(), workspace.tracking_uri)
    registry, hints = _registry(workspace.tracking_uri)
    used = used_bundles(run_folders(home.runs, Findings())) | used_just_now(home.cache)
    found = _sweep(home, used, registry, with_finished=finished, delete=False)
    models = list(registry.unused(used, with_versions=versions)) if registry is not None else []
    paths = [item.path for item in found.items]
    sizes = dict(zip(paths, bytes_on_disk(paths), strict=True))
    if delete:
        found = _sweep(home, used, registry, with_finished=finished, delete=True)
        models = _delete(models, registry, found.errors)
    kept_sizes = bytes_on_disk([kept.path for kept in found.kept])
    items = [_described(item.kind, item.path, sizes.get(item.path, 0), item.why, home) for item in found.items]
    items += [{"kind": "model", "what": m.address, "bytes": m.num_bytes, "why": m.why} for m in models]
    return {
        "home": str(home.home),
        "is_removed": delete,
        "items": sorted(items, key=lambda item: -item["bytes"]),
        "bytes": sum(item["bytes"] for item in items),
        "kept": [_described("kept", k.path, n, k.why, home) for k, n in zip(found.kept, kept_sizes, strict=True)],
        "hints": hints,
        "errors": found.errors,
    }


def _registry(tracking_uri: str) -> tuple[Registry | None, list[str]]:
    """What is registered, and what to tell the user about it; None when the server does not say."""
    try:
        records = Records(tracking_uri)
        registry = Registry(records)
    except UserError as error:
        return None, [f"registered models and cached bundles were left alone: {error}"]
    if not records.has_deleted_runs():
        return registry, []
    store = records.address.uri if records.address.database else "ITS DATABASE, on the server's machine"
    return registry, [f"runs that are deleted in MLflow keep their files until: mlflow gc --backend-store-uri {store}"]


def _sweep(
    home: Workspace, used: set[str], registry: Registry | None, *, with_finished: bool, delete: bool
) -> Findings:
    found = Findings()
    for folder in run_folders(home.runs, found):
        found += sweep_run(folder, partial(_is_newest, home), with_finished=with_finished, delete=delete)
    return found + sweep_cache(home.cache, used, registry, delete=delete)


def _is_newest(home: Workspace, folder: Path) -> bool:
    """Whether `--resume` would take this run; a folder that somebody has renamed counts as such."""
    return home.latest_run_folder(folder.name.rpartition("-")[0]) in (folder, None)


def _delete(models: list[StoredModel], registry: Registry | None, errors: list[str]) -> list[StoredModel]:
    gone = []
    for model in models:
        assert registry is not None, "models come from it"
        try:
            registry.delete(model)
            gone.append(model)
        except UserError as error:
            errors.append(str(error))
    return gone


def _described(kind: str, path: Path, num_bytes: int, why: str, home: Workspace) -> dict[str, Any]:
    return {"kind": kind, "what": str(path.relative_to(home.home)), "bytes": num_bytes, "why": why}


def present(result: dict[str, Any]) -> str:
    """What goes or went, the largest first, what stays and why, and what to do next."""
    is_removed, items = result["is_removed"], result["items"]
    verb = "removed" if is_removed else "would remove"
    lines = [f"{verb} {len(items)} things of {_size(result['bytes'])} from {result['home']}"]
    for item in items[:MAX_SHOWN]:
        lines.append(f"  {_size(item['bytes']):>9}  {item['kind']:<10}  {item['what']}")
        lines.append(f"             {item['why']}")
    if len(items) > MAX_SHOWN:
        rest = sum(item["bytes"] for item in items[MAX_SHOWN:])
        lines.append(f"  {_size(rest):>9}  and {len(items) - MAX_SHOWN} more; --json lists all")
    lines += ["kept"] if result["kept"] else []
    lines += _kept_lines(result["kept"])
    lines += [f"note: {hint}" for hint in result["hints"]]
    lines += [f"error: {error}" for error in result["errors"]]
    if not is_removed and items:
        lines.append("nothing was removed: this is what --delete would do")
    return "\n".join(lines)


def _kept_lines(kept: list[dict[str, Any]]) -> Iterator[str]:
    """One line a reason, the one that keeps most first."""
    by_reason = defaultdict[str, list[dict[str, Any]]](list)
    for one in kept:
        by_reason[one["why"]].append(one)
    totals = {why: sum(one["bytes"] for one in group) for why, group in by_reason.items()}
    for why in sorted(by_reason, key=lambda why: -totals[why]):
        group = sorted(by_reason[why], key=lambda one: -one["bytes"])
        others = f" and {len(group) - 1} more" if len(group) > 1 else ""
        yield f"  {_size(totals[why]):>9}  {group[0]['what']}{others}"
        yield f"             {why}"


def _size(num_bytes: float) -> str:
    unit = 0
    while num_bytes >= 1000 and unit < len(UNITS) - 1:
        num_bytes, unit = num_bytes / 1000, unit + 1
    return f"{num_bytes:.{0 if unit == 0 else 1}f} {UNITS[unit]}"
