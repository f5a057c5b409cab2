"""Plots and the page of a results file."""
