"""What is fuzzed: every loader of files that someone else may have made, with good files and a way to spoil them."""

from __future__ import annotations

import fuzz_files
import fuzz_runs

TARGETS = (*fuzz_files.TARGETS, *fuzz_runs.TARGETS)
