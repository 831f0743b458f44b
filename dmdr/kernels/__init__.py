"""How the networks run on a device: compiled, by which attention kernel, and what the backward pass computes again."""
