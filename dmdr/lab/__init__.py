"""A small world for experiments on a CPU: a renderer, an exact checker, tiny teachers, rewards and their recipes."""
