"""Reinforcement learning beside distribution matching, one file an algorithm.

The seam: an algorithm is called with the student's x0 (B, C, H, W), graph attached, and the B prompts, on the states
the student is trained on; it returns its loss, before the weight, and figures to log.
"""
