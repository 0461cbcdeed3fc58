"""Tests that need hosts: network namespaces on this machine."""

import os
import shutil
import subprocess

import pytest


def _namespaces_work():
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        return False
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, timeout=10).returncode == 0
    subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=10)
    return made


needs_namespaces = pytest.mark.skipif(not _namespaces_work(), reason="needs root, iproute2 and network namespaces")
