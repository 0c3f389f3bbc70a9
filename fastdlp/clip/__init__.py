"""CLIP, from open_clip to frozen towers that take adapters."""
