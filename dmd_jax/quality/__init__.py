"""Quality of samples: feature networks, metrics, rows of a report, tables and figures."""
