# SPDX-License-Identifier: Apache-2.0
"""A ServerApp whose noise is the same every time, so that engines can be compared bit by bit."""

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from fedsynth.server.app import conduct_named
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp


class FixedKeyStream:
    """A ChaCha20 key stream under a key that everybody knows."""

    is_secret = False

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.ChaCha20(bytes(32), bytes(16)), mode=None).encryptor()

    def read(self, num_bytes: int) -> bytes:
        """The next `num_bytes` bytes of the stream."""
        return self._stream.update(bytes(num_bytes))


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Conduct the run that `run` names, with noise that protects nobody."""
    conduct_named(grid, context, FixedKeyStream())
