"""Dovetail on the Acme accelerator, which looks very much like a processor."""

from __future__ import annotations

from importlib.util import find_spec

from dovetail.core.contracts.platform import Platform, PlatformPlugin, ProbeResult

__all__ = ["PLUGIN"]


def _probe() -> ProbeResult:
    if find_spec("torch") is None:
        return ProbeResult(usable=False, reason="torch is not installed: pip install torch")
    return ProbeResult(usable=True, reason="one Acme card", num_devices=1)


def _create() -> Platform:
    from dovetail_acme.platform import AcmePlatform

    return AcmePlatform()


PLUGIN = PlatformPlugin(
    api_version=1,
    probe=_probe,
    create=_create,
    environment={"ACME_VISIBLE_CARDS": "0"},
)
