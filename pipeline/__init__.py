"""Data and representations: frames, latent-variable models, their registry. Knows nothing of RLlib."""
