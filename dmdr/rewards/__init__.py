"""Reward models with one small protocol, one file a reward."""
