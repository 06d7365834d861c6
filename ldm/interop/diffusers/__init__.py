"""diffusers' pipeline folders: configurations, schedulers, index, a LoRA's folder."""
