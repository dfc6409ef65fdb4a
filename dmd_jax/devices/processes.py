"""What the processes of a job must agree on. Imports jax."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

LONGEST = 1024  # bytes of a text


def from_first(compute: Callable[[], str]) -> str:
    """The text that `compute()` returns on process 0, on every process; all must call it.

    Raises:
        ValueError: the text is longer than LONGEST bytes.
    """
    if jax.process_count() == 1:
        return compute()
    encoded = compute().encode() if jax.process_index() == 0 else b""
    if len(encoded) > LONGEST:
        raise ValueError(f"a text of {len(encoded)} bytes; at most {LONGEST} can be sent")
    sent = np.frombuffer(encoded.ljust(LONGEST, b"\0"), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))).rstrip(b"\0").decode()


def together(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`call(*args, **kwargs)`, whose failure on one process is a failure on all; all must call it.

    A process that fails alone would leave the others waiting in the next computation that all take
    part in. So work that can fail on one host, such as reading a file, is done `together` before
    such a computation. A failure inside of one is beyond this: the others wait within the call.

    Raises:
        Exception: what the call raised on this process.
        RuntimeError: it raised on others only.
    """
    if jax.process_count() == 1:
        return call(*args, **kwargs)
    result = error = None
    try:
        result = call(*args, **kwargs)
    except Exception as caught:
        error = caught
    failed = np.asarray(multihost_utils.process_allgather(np.array(error is not None)))
    if error is not None:
        raise error
    if failed.any():
        raise RuntimeError(f"process {failed.argmax()} of the job failed; its log has the reason")
    return result
