"""What surrounds a network of videos: video files, prompts, text and the parts of a pipeline."""
