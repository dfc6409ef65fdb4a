"""A run: its config resolved, its loop and step, and what it leaves on disk."""
