"""The models that are compared, what they draw, and how it is judged."""
