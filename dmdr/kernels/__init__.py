"""How the networks run on a device: under which adapter, compiled, by which attention kernel, in how many bits."""
