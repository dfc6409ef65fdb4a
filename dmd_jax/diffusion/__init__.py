"""What a diffusion model is: its noise schedule, its network as a denoiser, its ODE solvers."""
