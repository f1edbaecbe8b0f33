"""The pictures of an encoder: from frames that it has not learned from, into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.encoder_place import EncoderPlace
from pipeline.artifact import load_config, load_model, load_preprocess, load_stats
from pipeline.errors import UserError
from pipeline.order import ReadingOrder
from pipeline.origin import load_origin
from pipeline.pictures import Figures, encoder_pictures, units_picture
from pipeline.plate import Pixels
from pipeline.store import FramesDataset
from pipeline.views import units

PICTURES_FOLDER = "pictures"
NUM_PICTURED = 512


def frames_to_look_at(dataset: FramesDataset) -> tuple[Pixels, str]:
    """Some frames (N, H, W) of a dataset, held out where there are such, and what they are in words."""
    from pipeline.stream import sample_frames  # Ray Data, which takes seconds

    has_heldout = "val" in dataset.episodes["split"].to_pylist()
    order = ReadingOrder.whole(dataset, "val" if has_heldout else "train", 1, 1)
    frames: Pixels = sample_frames(dataset, order, NUM_PICTURED).numpy()
    kind = "held-out frames" if has_heldout else "frames, none of them held out,"
    return frames, f"{len(frames)} {kind} of dataset {dataset.digest[:12]}"


def draw_figures(bundle: Path, frames: Pixels, source: str, folder: Path) -> None:
    """Draws the pictures of a bundle's model; of fewer than two frames none that needs frames."""
    stats = load_stats(bundle)
    folder.mkdir(parents=True, exist_ok=True)
    units_picture(units(load_config(bundle).latent_shape, stats.kl, stats.active), folder)
    if len(frames) > 1:
        encoder_pictures(load_model(bundle), frames, folder, source)


def figures_of(place: EncoderPlace, data: str | None, remarks: list[str]) -> tuple[Path, bool]:
    """The folder with an encoder's pictures, drawn now where they are not there or `data` asks for others.

    Args:
        place: The encoder's.
        data: Folder or address of the dataset to take frames from; None for that which it learned from.
        remarks: Gets a sentence where there are no pictures.

    Returns:
        The folder, and whether something was drawn into it now.

    Raises:
        UserError: `data` is no dataset, or of frames that the encoder does not take.
    """
    if data is not None:
        dataset = FramesDataset.open(data if "://" in data else str(Path(data).expanduser().absolute()))
        own = load_preprocess(place.bundle)
        own.require_match(dataset.preprocess, mine=f"the encoder {place.address}", theirs="these frames")
        return _drawn(place, dataset, place.folder / f"{PICTURES_FOLDER}-{dataset.digest[:8]}"), True
    folder = place.folder / PICTURES_FOLDER
    if Figures.read(folder) is not None:
        return folder, False
    source = _own_data(place, remarks)
    return (_drawn(place, source, folder), True) if source else (folder, False)


def _drawn(place: EncoderPlace, dataset: FramesDataset, folder: Path) -> Path:
    draw_figures(place.bundle, *frames_to_look_at(dataset), folder)
    return folder


def _own_data(place: EncoderPlace, remarks: list[str]) -> FramesDataset | None:
    """What the encoder learned from, where it still lies where it lay."""
    uri, origin = place.facts.get("dataset"), load_origin(place.bundle)
    digest = origin.digest if origin else place.facts.get("dataset_digest") or place.facts.get("digest")
    why = "where its training frames lie is not known here"
    if uri and "?" in str(uri):  # a run's folder may be someone else's, and must not choose a host
        why = f"{uri} names a host of its own"
    elif uri:
        try:
            dataset = FramesDataset.open(str(uri))
            if dataset.digest == digest:
                return dataset
            why = f"{uri} is another dataset now than the one that it learned from"
        except UserError as error:
            why = str(error)
    remarks.append(f"No frames to draw pictures of: {why}. Type: latentrl report {place.address} --data DIR")
    return None


def absent(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of the pictures that are not there."""
    return [name for name in names if not (folder / f"{name}.png").is_file()]
