"""How good samples are: metrics, the networks that they see through, tables and figures."""
