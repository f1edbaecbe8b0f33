"""The claims made for VAEs, as checks anyone can run: `make claims`."""
