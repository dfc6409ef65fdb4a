"""Mesh, CPU cores, random numbers, names of arrays, disk. Imports no other room."""
