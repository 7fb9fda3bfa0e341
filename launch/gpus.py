"""Which GPUs a process sees, where the launcher says it in another way than the libraries ask. Pure."""

from __future__ import annotations

from collections.abc import Mapping

ROCR, HIP = "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"


def hip_devices(env: Mapping[str, str]) -> dict[str, str]:
    """What AMD's HIP, and so Ray, is to be told: Slurm shows a task its own GPUs by ROCR's list, and
    within that HIP counts from 0. Empty if nothing is to be said.

    >>> hip_devices({"ROCR_VISIBLE_DEVICES": "4,5"})
    {'HIP_VISIBLE_DEVICES': '0,1'}
    """
    if not env.get(ROCR) or env.get(HIP):
        return {}
    return {HIP: ",".join(map(str, range(len(env[ROCR].split(",")))))}
