"""Experiments that sweeps run: functions of plain parameters that return plain results."""
