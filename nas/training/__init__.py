"""Training and evaluation: one loop for a stand-alone model and a supernet, and the loss on fixed sequences.

Owns the loop (`loop`), the sampling of a supernet's subnets (`strategies`), the loss and the measured `Evaluation`.
"""
