"""What a transformer can share, and what that costs: shapes, plans, primitives, configs, search spaces, bytes and operations.

Owns everything that can be said of a model without a weight or a text.
"""
