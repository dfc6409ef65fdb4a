"""Images and labels: TensorFlow Datasets builders, read at random positions through Grain."""
