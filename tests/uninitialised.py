"""A plug-in of pytest: torch gives memory full of NaN, so that nobody relies on what lies there.

pytest -p tests.uninitialised tests/attention_backends
"""

import torch

torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True
if not torch.empty(2).isnan().all():
    raise RuntimeError("torch.empty gives no NaN")
