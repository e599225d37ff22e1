"""The criteria: one file each."""
