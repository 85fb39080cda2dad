"""Dovetail on a simulated accelerator: for developing platforms without hardware."""
