"""What a config needs of memory, work and hours, before anyone pays."""
