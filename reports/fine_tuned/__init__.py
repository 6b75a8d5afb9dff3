"""A tabular benchmark of fine-tuned sharing."""
