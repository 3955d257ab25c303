# SPDX-License-Identifier: Apache-2.0
"""The local engine: a Flower grid in this process, with every client's app called in turn."""

import time
from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_SERVER_NODE = 1
_RUN_ID = 1
_FAILED, _GONE = 2, 5  # Flower's own error codes for an app that raised, and for a lost node


class LocalGrid(Grid):
    """Answers messages with a ClientApp in this process, one client after another.

    Args:
      client_app: The app that every client runs.
      num_clients: Clients, numbered as Flower's simulation numbers them.
      run_config: What `context.run_config` holds at each client.
      wire: Send every message and reply through its serialized form, as a network would.
      loses: Whether to lose the reply of a client (by its number) to a message; for tests.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_clients: int,
        *,
        run_config: dict[str, Any] | None = None,
        wire: bool = False,
        loses: Callable[[int, Message], bool] | None = None,
    ) -> None:
        # Flower's messages ask this private class who they come from; all that this engine
        # touches of Flower's insides is here, and `tests/simulation/test_local.py` watches it
        TaskIdentity.run_id, TaskIdentity.task_id = _RUN_ID, 1
        TaskIdentity.node_id = _SERVER_NODE
        self._app, self._wire = client_app, wire
        self._loses = loses or (lambda number, message: False)
        self._run = Run.create_empty(_RUN_ID)
        self._contexts = {
            _SERVER_NODE + 1 + number: Context(
                run_id=_RUN_ID,
                node_id=_SERVER_NODE + 1 + number,
                node_config={"partition-id": number, "num-partitions": num_clients},
                state=RecordDict(),
                run_config=run_config or {},
            )
            for number in range(num_clients)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Take another run's identity."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid belongs to."""
        return self._run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Refused: Flower deprecates it; build a `Message` instead."""
        raise NotImplementedError("build a flwr.app.Message instead")

    def get_node_ids(self) -> Iterable[int]:
        """Identifiers of all clients."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All clients, as Flower describes nodes."""
        return [NodeInfo(node_id=node) for node in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver messages; each is answered before the next is delivered."""
        names = []
        for message in messages:
            name = str(uuid4())
            message.metadata.__dict__["_message_id"] = name
            reply = self._answer(message)
            if reply is not None:
                self._replies[name] = reply
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to the messages named, each once."""
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Replies, made one at a time as they are read, so that one is held and not all.

        A client whose turn comes after the timeout is not asked.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        for message in messages:
            if deadline is not None and time.monotonic() > deadline:
                return
            yield from self.pull_messages(self.push_messages([message]))

    def _answer(self, message: Message) -> Message | None:
        """The reply of the client that a message is for."""
        context = self._contexts.get(message.metadata.dst_node_id)
        if context is None:
            return Message(Error(_GONE, "no such node"), reply_to=message)
        if self._loses(int(context.node_config["partition-id"]), message):
            return None
        delivered = _through_the_wire(message) if self._wire else _copied(message)
        try:
            reply = self._app(delivered, context)
        except Exception as error:  # noqa: BLE001  (as Flower's own engines: an error reply)
            return Message(Error(_FAILED, f"{type(error)}:{error}"), reply_to=message)
        return _through_the_wire(reply) if self._wire else reply


def _copied(message: Message) -> Message:
    """A message whose records a client may change without the sender seeing it."""
    copy = message.content.copy()
    for name, record in message.content.items():
        copy[name] = record.copy()
    make: Any = Message  # Flower's overloads leave out the form that it uses itself
    copied: Message = make(metadata=message.metadata, content=copy)
    return copied


def _through_the_wire(message: Message) -> Message:
    """A message serialized and read back."""
    from flwr.common.serde import message_from_proto, message_to_proto

    return message_from_proto(message_to_proto(message))
