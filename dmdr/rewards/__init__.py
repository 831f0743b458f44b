"""Rewards behind one small protocol, one file a reward."""
