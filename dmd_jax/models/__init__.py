"""Network families. They import jax, flax and the infrastructure below, and nothing above them."""
