"""The student in the forms that people deploy, and whether each draws what the training sampler draws."""
