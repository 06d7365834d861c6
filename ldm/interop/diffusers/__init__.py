"""diffusers' layout: pipeline folders, their index, configurations and schedulers, and the folder of a LoRA."""
