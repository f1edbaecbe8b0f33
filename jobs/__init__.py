"""The command line: one module a stage, wiring only."""
