"""The samplers of `nas search` compared on deep trained models: how good a front, after how many zero-shot evaluations."""
