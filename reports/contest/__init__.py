"""The front of a search beside what could be had without one: published schemes, random configs, smaller dense models."""
