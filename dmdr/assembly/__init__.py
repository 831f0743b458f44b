"""A training stage, put together from its config: networks and state, what stays the same, and its watch."""
