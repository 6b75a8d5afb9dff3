"""The front of a search from a trained model, by how its configs are evaluated."""
