"""An encoder bundle on its way from the driver to the workers: bytes in Ray's object store, verified on arrival."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from pipeline import artifact
from pipeline.artifact import Encoder
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
        blob: bytes = ray.get(self.ref)
        with tempfile.TemporaryDirectory(prefix="latentrl-encoder-") as folder:
            path = artifact.unpack(blob, Path(folder) / "bundle", self.sha256)
            return artifact.load_encoder(path, expect_sha256=self.sha256, preprocess=preprocess)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedBundle:
        """Itself: RLlib copies configurations often, and the reference never changes."""
        return self
