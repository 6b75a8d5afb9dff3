"""The decoder that runs a plan, and the supernet whose Parameters its subnets use."""
