"""How fast this machine's AES is by OpenSSL's own measure: the limit for masks from AES-256-CTR."""

from __future__ import annotations

import re
import shutil
import subprocess

__all__ = ["openssl_aes256ctr_bytes_per_s"]

BLOCK_BYTES = 16_384
"""What is encrypted at a time, the largest of OpenSSL's usual sizes."""


def openssl_aes256ctr_bytes_per_s(seconds: int = 1) -> float:
    """Return the bytes a second that ``openssl speed -evp aes-256-ctr`` reports, on one core.

    Args:
        seconds: how long it measures.

    Raises:
        FileNotFoundError: there is no ``openssl``.
        RuntimeError: it fails, or reports nothing that can be read; LibreSSL does.
    """
    program = shutil.which("openssl")
    if program is None:
        raise FileNotFoundError("no program 'openssl' on the PATH: the machine's AES cannot be measured by it")
    command = [program, "speed", "-mr", "-evp", "aes-256-ctr", "-bytes", str(BLOCK_BYTES), "-seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 60)  # noqa: S603
    found = re.search(r"^\+F:\d+:aes-256-ctr:(\d+(?:\.\d+)?)\s*$", done.stdout, re.IGNORECASE | re.MULTILINE)
    if done.returncode or found is None:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {said[-1] if said else 'no output'}")
    return float(found[1])
