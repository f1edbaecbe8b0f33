"""What `benchmarks/learning.py` runs: tasks, arms, cells, and the page that they become."""
