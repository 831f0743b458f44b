"""A small world for a CPU: a renderer, an exact checker, tiny teachers and rewards, and how they were built."""
