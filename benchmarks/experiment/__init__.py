"""What `benchmarks/atari.py` runs: arms, games, cells, and what they come to."""
