"""Arenas and the ways between disk, host and device memory. Moves bytes, decides nothing."""
