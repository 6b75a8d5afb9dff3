"""The samplers of `nas search` compared on the tabular benchmark: how good a front, after how many evaluations."""
