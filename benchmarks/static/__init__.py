"""The static lane: every kernel configuration compiled ahead of time, without a GPU."""
