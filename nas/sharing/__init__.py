"""What a transformer can share, and what it costs: shapes, plans, primitives, configs, search spaces, bytes and operations.

Nothing here needs weights or text.
"""
