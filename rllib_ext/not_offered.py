"""What RLlib's algorithms offer and LatentDQN does not: each says what to do instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.errors import UserError


class NotOffered:
    """Goes before RLlib's Algorithm among the bases."""

    @classmethod
    def from_checkpoint(cls, path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """RLlib's way needs the configuration from the checkpoint, in a pickle: always a UserError."""
        raise UserError(
            f"LatentDQN's checkpoints hold no configuration; build the algorithm from yours and call "
            f"restore_from_path({str(path)!r})"
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """RLlib's evaluation workers are not supported.

        Raises:
            UserError: Always.
        """
        raise UserError("LatentDQN does not evaluate itself; write a policy bundle and run `latentrl evaluate`")
