"""Neural architecture search for how a transformer language model shares its parameters and its KV cache.

Each room is imported by its own name (`nas.space`, `nas.search`, …); `import nas` alone loads nothing.
"""
