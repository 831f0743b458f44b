"""`python -m dmdr.planning.measure`: ten minutes of a GPU beside what the planner says of it."""
