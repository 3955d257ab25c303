# SPDX-License-Identifier: Apache-2.0
"""The local engine keeps Flower's contracts, and the private names it touches are still there."""

import time
from collections.abc import Callable

import numpy as np
import pytest
from fedsynth.simulation.local import LocalGrid
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Answer = Callable[[Message, Context], RecordDict]
DTYPES = ("float32", "float64", "int8", "int64", "uint8", "uint32")


def client_app(answer: Answer) -> ClientApp:
    """A Flower app with one handler, as `client/app.py` has."""
    app = ClientApp()

    @app.query("answer")
    def handler(message: Message, context: Context) -> Message:
        return Message(answer(message, context), reply_to=message)

    return app


def config(**values: int | str | list[str]) -> RecordDict:
    return RecordDict({"config": ConfigRecord(values)})


def number(context: Context) -> int:
    return int(context.node_config["partition-id"])


def messages(grid: LocalGrid, content: RecordDict) -> list[Message]:
    return [Message(content, node, "query.answer") for node in grid.get_node_ids()]


def numbered(message: Message, context: Context) -> RecordDict:
    return config(number=number(context), of=int(context.node_config["num-partitions"]))


def values(replies: list[Message], key: str = "number") -> list[int]:
    return [reply.content["config"][key] for reply in replies]


def test_flower_still_takes_the_three_private_names_that_this_engine_sets():
    grid = LocalGrid(client_app(numbered), 1)
    (message,) = messages(grid, config())

    (name,) = grid.push_messages([message])

    assert (TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id) == (1, 1, 1)
    assert (message.metadata.run_id, message.metadata.src_node_id) == (1, 1)
    assert isinstance(grid.run, Run)
    assert grid.run.run_id == 1
    assert message.metadata.message_id == name
    (reply,) = grid.pull_messages([name])
    assert reply.metadata.reply_to_message_id == name


def test_clients_are_numbered_as_flowers_simulation_numbers_them():
    grid = LocalGrid(client_app(numbered), 3)

    replies = list(grid.send_and_receive(messages(grid, config())))

    assert values(replies) == [0, 1, 2]
    assert values(replies, "of") == [3, 3, 3]
    assert [r.metadata.src_node_id for r in replies] == list(grid.get_node_ids())
    assert [node.node_id for node in grid.get_nodes()] == list(grid.get_node_ids())


def test_a_message_through_the_wire_is_answered_bit_for_bit_the_same():
    rng = np.random.default_rng(0)
    sent = {kind: (rng.normal(size=(3, 5)) * 50).astype(kind) for kind in DTYPES}
    sent["odd"] = np.array([np.nan, np.inf, -np.inf, -0.0, 5e-324, 1e308])
    content = RecordDict({"arrays": ArrayRecord({k: _array(v) for k, v in sent.items()})})

    def echo(message: Message, context: Context) -> RecordDict:
        return RecordDict({"arrays": ArrayRecord(dict(message.content["arrays"]))})

    seen = []
    for wire in (False, True):
        grid = LocalGrid(client_app(echo), 2, wire=wire)
        replies = list(grid.send_and_receive(messages(grid, content)))
        seen.append([{k: a.data for k, a in r.content["arrays"].items()} for r in replies])

    assert seen[0] == seen[1]
    assert seen[0][0] == {k: _array(v).data for k, v in sent.items()}


def test_the_wire_finds_a_content_that_only_this_process_can_carry():
    content = config(number=1 << 70)  # a Python int; Flower's wire takes 64 bits
    carried = LocalGrid(client_app(numbered), 1)
    sent = LocalGrid(client_app(numbered), 1, wire=True)

    assert values(list(carried.send_and_receive(messages(carried, content)))) == [0]
    with pytest.raises(ValueError, match="out of range"):
        list(sent.send_and_receive(messages(sent, content)))


@pytest.mark.parametrize("wire", [False, True])
def test_a_client_that_raises_gives_an_error_reply_and_the_others_answer(wire):
    def fails(message: Message, context: Context) -> RecordDict:
        if number(context) == 1:
            raise ValueError("no")
        return numbered(message, context)

    grid = LocalGrid(client_app(fails), 3, wire=wire)

    replies = list(grid.send_and_receive(messages(grid, config())))

    assert [r.has_error() for r in replies] == [False, True, False]
    assert replies[1].error.code == 2
    assert replies[1].metadata.src_node_id == list(grid.get_node_ids())[1]
    assert values([replies[0], replies[2]]) == [0, 2]


def test_a_message_to_a_node_that_does_not_exist_gives_an_error_reply():
    grid = LocalGrid(client_app(numbered), 1)

    (reply,) = grid.send_and_receive([Message(config(), 999, "query.answer")])

    assert reply.has_error()
    assert reply.error.code == 5


def test_a_lost_reply_never_comes_and_the_client_was_not_asked():
    asked = []

    def notes(message: Message, context: Context) -> RecordDict:
        asked.append(number(context))
        return numbered(message, context)

    grid = LocalGrid(client_app(notes), 3, loses=lambda client, message: client == 1)

    replies = list(grid.send_and_receive(messages(grid, config()), timeout=60))

    assert values(replies) == [0, 2]
    assert asked == [0, 2]


@pytest.mark.parametrize("wire", [False, True])
def test_what_a_client_does_to_its_message_nobody_else_sees(wire):
    def spoils(message: Message, context: Context) -> RecordDict:
        record = message.content["config"]
        whole = int(record.get("key") == "kept" and "other" not in record)
        record.pop("key", None)
        record["other"] = "left behind"
        del message.content["config"]
        return config(number=whole)

    content = config(key="kept")
    grid = LocalGrid(client_app(spoils), 3, wire=wire)

    replies = list(grid.send_and_receive(messages(grid, content)))

    assert values(replies) == [1, 1, 1]
    assert dict(content["config"]) == {"key": "kept"}


def test_each_client_keeps_a_state_of_its_own_between_messages():
    def counts(message: Message, context: Context) -> RecordDict:
        seen = context.state.setdefault("seen", ConfigRecord({"times": 0}))
        seen["times"] += 1 + 10 * number(context)
        return config(number=seen["times"])

    grid = LocalGrid(client_app(counts), 2)
    first = list(grid.send_and_receive(messages(grid, config())))
    second = list(grid.send_and_receive(messages(grid, config())))

    assert (values(first), values(second)) == ([1, 11], [2, 22])


def test_a_client_whose_turn_comes_after_the_timeout_is_not_asked():
    asked = []

    def slow(message: Message, context: Context) -> RecordDict:
        asked.append(number(context))
        time.sleep(0.05)
        return numbered(message, context)

    grid = LocalGrid(client_app(slow), 3)

    replies = list(grid.send_and_receive(messages(grid, config()), timeout=0.01))

    assert len(replies) == len(asked) <= 1


def test_a_reply_is_made_when_it_is_read_so_that_one_is_held_and_not_all():
    asked = []

    def notes(message: Message, context: Context) -> RecordDict:
        asked.append(number(context))
        return numbered(message, context)

    grid = LocalGrid(client_app(notes), 3)
    replies = iter(grid.send_and_receive(messages(grid, config())))
    next(replies)

    assert asked == [0]


def test_a_pulled_reply_is_given_once():
    grid = LocalGrid(client_app(numbered), 2)
    names = list(grid.push_messages(messages(grid, config())))

    first, second = list(grid.pull_messages(names)), list(grid.pull_messages(names))

    assert values(first) == [0, 1]
    assert second == []


def test_a_run_configuration_reaches_every_client():
    def reads(message: Message, context: Context) -> RecordDict:
        return config(number=context.run_config["answer"])

    grid = LocalGrid(client_app(reads), 2, run_config={"answer": 42})

    assert values(list(grid.send_and_receive(messages(grid, config())))) == [42, 42]


def _array(value):
    return Array(
        dtype=value.dtype.name, shape=value.shape, stype="fedsynth.raw", data=value.tobytes()
    )
