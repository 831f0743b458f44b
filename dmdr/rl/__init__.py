"""Reinforcement learning beside distribution matching, one file an algorithm."""
