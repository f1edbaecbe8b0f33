"""The rows of the ruler: what AtariARI published, and what is measured here to compare with it."""
