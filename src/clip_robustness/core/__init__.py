"""What every wing stands on: files, the registry, statistics. Imports nothing heavier than NumPy."""
