"""A run from config to summary: setup, rounds, records."""
