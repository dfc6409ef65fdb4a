"""The ground: the mesh, random numbers, names of arrays and the disk. Knows no diffusion."""
