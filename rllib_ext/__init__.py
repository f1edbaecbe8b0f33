"""Distributed Q-learning on latents, as an extension of RLlib."""
