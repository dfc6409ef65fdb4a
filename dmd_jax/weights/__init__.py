"""Checkpoint files of ours and of others, to and from our trees."""
