"""How a generator makes a sample, in training and in inference. Imports the rooms below it."""
