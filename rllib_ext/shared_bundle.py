"""An encoder bundle on its way from the driver to the workers: bytes in Ray's object store, verified on arrival."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from pipeline import artifact
from pipeline.artifact import Encoder
from pipeline.models.latent import LatentModel
from pipeline.schema import Preprocess


@dataclass(frozen=True)
class SharedBundle:
    """A reference to a bundle's bytes; small enough to travel inside a configuration.

    Attributes:
        ref: Where the packed bundle lies in the object store.
        sha256: What the bundle must hash to.
    """

    ref: Any
    sha256: str

    @classmethod
    def put(cls, path: Path, sha256: str) -> SharedBundle:
        """Packs the bundle folder into the object store, once, in the driver."""
        return cls(ref=ray.put(artifact.pack(path)), sha256=sha256)

    def load(self, preprocess: Preprocess) -> Encoder:
        """Fetches, verifies and loads the encoder in this process.

        Raises:
            UserError: The bytes are not those that the driver sent, or the encoder's frames differ from `preprocess`.
        """
        with self._unpacked() as path:
            return artifact.load_encoder(path, expect_sha256=self.sha256, preprocess=preprocess)

    def load_model(self) -> LatentModel:
        """Fetches, verifies and loads the whole model, decoder included; errors as of `load`."""
        with self._unpacked() as path:
            return artifact.load_model(path)

    @contextlib.contextmanager
    def _unpacked(self) -> Iterator[Path]:
        """The bundle's folder for a while, its bytes those that the driver sent."""
        blob: bytes = ray.get(self.ref)
        with tempfile.TemporaryDirectory(prefix="latentrl-encoder-") as folder:
            yield artifact.unpack(blob, Path(folder) / "bundle", self.sha256)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedBundle:
        """Itself: RLlib copies configurations often, and the reference never changes."""
        return self
