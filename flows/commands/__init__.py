"""The commands of dmdr, one file each."""
