"""SmolLM2 compressed by whittle, beside a search."""
