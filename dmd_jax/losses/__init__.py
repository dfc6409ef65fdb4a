"""The objectives of the papers, as functions of values. Imports jax and the two rooms below."""
