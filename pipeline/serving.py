"""An encoder bundle as an MLflow model: this file is logged as the model's code, so that loading it needs no pickle.

MLflow runs it when `mlflow.pyfunc.load_model("models:/NAME@champion")` is called; nothing here imports it.
"""

from __future__ import annotations

from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import torch

from pipeline.artifact import load_encoder


class ServedEncoder(mlflow.pyfunc.PythonModel):
    """Frames in, standardised latents out."""

    def load_context(self, context: mlflow.pyfunc.PythonModelContext) -> None:
        """Loads and verifies the bundle that was logged beside this code."""
        self.encoder = load_encoder(context.artifacts["bundle"])

    def predict(
        self,
        context: mlflow.pyfunc.PythonModelContext,
        model_input: np.ndarray,  # Spelled so that MLflow knows it; an NDArray[uint8] makes it warn.
        params: dict[str, Any] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Encodes frames.

        Args:
            context: Unused.
            model_input: (N, H, W) uint8 grey frames, prepared as the bundle's preprocess.json says.
            params: Unused.

        Returns:
            (N, Z) float32, standardised posterior means.
        """
        frames = torch.from_numpy(np.ascontiguousarray(model_input))
        latents: npt.NDArray[np.float32] = self.encoder.encode(frames).cpu().numpy()
        return latents


mlflow.models.set_model(ServedEncoder())
