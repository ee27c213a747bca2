"""Goldens of single functions. Each module has make(folder)."""
