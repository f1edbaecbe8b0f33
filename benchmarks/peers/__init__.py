"""The rows of `benchmarks/q_learning.py`: each a loop that yields its counters while it runs."""
