"""What platforms that compute with PyTorch share: reference ops, dtypes and the runner."""
