"""How much memory, work and time a config needs, computed before anyone pays for it."""
