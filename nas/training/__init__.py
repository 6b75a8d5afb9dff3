"""Training and evaluation: one loop for a stand-alone model and a supernet, and the loss on fixed sequences.

Owns the loop (`loop`), learning from a teacher (`distillation`), the sampling of a supernet's subnets (`strategies`) and the
measured `Evaluation`.
"""
