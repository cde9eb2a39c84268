"""Faults to inject into edges, nodes and the network between them; see README.md."""
