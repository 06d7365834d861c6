"""Plots and sheets of pictures."""
