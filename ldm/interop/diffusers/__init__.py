"""diffusers' layout: pipeline folders with their index, configurations and schedulers."""
