"""Quality of samples: feature networks, metrics, tables and figures.

metrics           distances between two sets of features
features          the network that computes features: `classifier` (shipped) or `inception`
judge             all metrics of a set of samples against one reference
evaluation        settings (`config.evaluate`), and the rows of a table
evaluator         judges one run: previews during training, report.md at the end
report            tables and figures as files
metric_network    trains the classifier
rewards           numbers that a run is trained to raise (`config.reward`)

Imports the rooms below.
"""
