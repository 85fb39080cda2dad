"""What choosing tokens has in common on every platform: the noise. Numpy only.

The choosing itself runs on the device, next to the logits; for torch that is
``platforms/torch/sampler.py``. The noise is made here, on the host, so that a seeded request
meets the same numbers everywhere.
"""
