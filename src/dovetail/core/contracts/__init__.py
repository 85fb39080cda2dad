"""What a plug-in implements, one contract per file, and nothing else."""
