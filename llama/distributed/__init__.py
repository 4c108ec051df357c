"""Process groups, devices, and the agreement of ranks."""
