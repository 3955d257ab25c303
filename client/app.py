# SPDX-License-Identifier: Apache-2.0
"""The Flower ClientApp: unwrap a request, let `respond` answer it, wrap the reply."""

import logging

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ..core.errors import ClientCode
from ..core.randomness import OsKeyStream
from ..core.wire import Reply, WireError, ask_from_records, reply_to_records
from .respond import origin_of, respond
from .site import site_of

_log = logging.getLogger(__name__)

app = ClientApp()


@app.query("answer")
def answer(message: Message, context: Context) -> Message:
    """Reply to one query.

    Privacy:
      Flower sends the text of an exception to the server, so none may leave this function:
      whatever goes wrong becomes a fixed code, and the story stays in the owner's log.
    """
    run, round_, attempt = "unknown", 0, 0
    try:
        ask = ask_from_records(message.content)
        run, round_, attempt = ask.run, ask.round, ask.attempt
        site = site_of(context)
        if site is None:
            _log.error("no shard: set shard, schema, policy and state in --node-config")
            reply = Reply(run, round_, attempt, ClientCode.NO_SHARD)
        else:
            reply = respond(ask, site, OsKeyStream())
    except WireError as error:
        _log.error("refused a malformed request: %s", error)
        reply = Reply(run, round_, attempt, ClientCode.MALFORMED)
    except Exception as error:  # noqa: BLE001  (outermost: nothing of it may reach the server)
        _log.error("this client could not answer: %s", origin_of(error))
        reply = Reply(run, round_, attempt, ClientCode.INTERNAL)
    return Message(reply_to_records(reply), reply_to=message)
