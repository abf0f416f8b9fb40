"""Seconds to save and to restore a checkpoint, in a folder and on a local S3 server.

python benchmarks/stores.py [MEGABYTES]

The server is moto's (pip install 'triform[test]') in a process of its own on the same
machine: what is measured is the cost of our way there, not of a network.
"""

import os
import subprocess
import sys
import tempfile
import time
import urllib.request

import jax
import jax.numpy as jnp

from triform.runtime import stores
from triform.runtime.checkpoint import CheckpointConfig, Checkpointer

SERVER = """
from moto.server import ThreadedMotoServer
import logging, time
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
time.sleep(3600)
"""
TIMES = 3
ARRAYS = 50


def measure(folder: str, state: dict) -> tuple[float, float, float]:
    """(seconds until training goes on, until the step is saved, to restore it)."""
    found = []
    with Checkpointer(folder, CheckpointConfig(every=1)) as checkpointer:
        for step in range(1, TIMES + 1):
            start = time.perf_counter()
            checkpointer.save(step, state, meta={})
            began = time.perf_counter()
            checkpointer.wait()
            saved = time.perf_counter()
            restored = checkpointer.restore(jax.eval_shape(lambda: state), step)
            jax.block_until_ready(restored[0])
            end = time.perf_counter()
            found.append((began - start, saved - start, end - saved))
    return tuple(sorted(column)[TIMES // 2] for column in zip(*found, strict=True))


def main() -> None:
    """Prints the median of TIMES saves of ARRAYS arrays."""
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True
    )
    try:
        host, port = next(x for x in server.stdout if "Starting" not in x).split()
        os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
        os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
        os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
        request = urllib.request.Request(
            f"http://{host}:{port}/checkpoints", method="PUT"
        )
        urllib.request.urlopen(request).close()
        count = size * 1_000_000 // 4 // ARRAYS
        state = {f"x{i}": jnp.arange(count, dtype="float32") for i in range(ARRAYS)}
        with tempfile.TemporaryDirectory() as folder:
            for place in (f"{folder}/checkpoints", "s3://checkpoints/run/checkpoints"):
                began, saved, restored = measure(place, state)
                kind = "s3" if stores.is_store(place) else "folder"
                print(
                    f"{kind:6}  {size} MB: training goes on after {began:.2f} s, "
                    f"saved after {saved:.2f} s, restored in {restored:.2f} s"
                )
    finally:
        server.kill()


if __name__ == "__main__":
    main()
