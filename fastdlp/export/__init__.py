"""Trained adapters in other programs' formats, and back; evaluation of finished runs."""
