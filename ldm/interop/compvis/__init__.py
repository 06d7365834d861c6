"""CompVis' layout: the single files of latent-diffusion's and Stable Diffusion's original code."""
