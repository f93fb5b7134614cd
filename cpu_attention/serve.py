"""The loop around an R-worker: one message in, at most one out.  Thin, because everything else is `rworker`."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable

from msgspec import structs

from cpu_attention.rworker import RWorker
from transport import (
    Attended,
    BadDelivery,
    ChannelClosed,
    Failure,
    Goodbye,
    Hello,
    Listener,
    Message,
    MessageTooLarge,
    PeerLost,
    PeerTimeout,
    Refusals,
    Welcome,
)

logger = logging.getLogger(__name__)

_IDLE_S = 1.0  # waiting for work is no failure; but a signal may only be seen when the wait ends
_ANSWER_TIMEOUT_S = 10.0  # for the session's owner; nobody else may make it wait


def serve(listener: Listener, worker: RWorker, *, dismissable: bool = False) -> None:
    """Answers S-workers until the listener is closed or, if `dismissable`, a Goodbye that dismisses comes.

    One session at a time: a Hello while another S-worker is in session and reachable is refused; one that
    has vanished without a Goodbye is replaced.
    """
    owner: Hashable = None  # the peer of the session that is open
    refusals = Refusals(logger)
    while True:
        try:
            delivery = listener.recv(timeout_s=_IDLE_S)
        except PeerTimeout:
            continue
        except ChannelClosed:
            return
        except BadDelivery as error:
            refusals.tell(f"refused a frame: {error}", error.origin)
            _answer(listener, error.peer, 0, Failure("ProtocolError", str(error)[:4096]), 0.0, refusals)
            continue
        peer, session, message = delivery.peer, delivery.envelope.session, delivery.envelope.message
        reply: Message | None
        if isinstance(message, Hello) and worker.session is not None and peer != owner and listener.is_reachable(owner):
            reply = Failure("Busy", "this R-worker is in session with another S-worker; wait, or start one more")
        elif isinstance(message, Goodbye) and message.dismiss and not dismissable:
            reply = Failure("BadRequest", "this R-worker was not started for one job and cannot be dismissed")
        else:
            began_ns = time.monotonic_ns()
            reply = worker.handle(session, message)
            if isinstance(reply, Attended):
                reply = structs.replace(reply, began_ns=began_ns, ended_ns=time.monotonic_ns())
            if isinstance(reply, Welcome):
                owner = peer
        if isinstance(reply, Failure) and peer != owner:
            refusals.tell(f"refused {type(message).__name__}: {reply.text}", delivery.origin)
        if reply is not None:
            _answer(listener, peer, session, reply, _ANSWER_TIMEOUT_S if peer == owner else 0.0, refusals)
        if isinstance(message, Goodbye) and message.dismiss and dismissable:
            return
        del delivery, message, reply  # and with them what they hold of the transport's memory


def _answer(
    listener: Listener, peer: Hashable, session: int, reply: Message, timeout_s: float, refusals: Refusals
) -> None:
    """A peer that has gone, or takes nothing any more, is its own loss, not this worker's."""
    try:
        try:
            listener.send(peer, session, reply, timeout_s=timeout_s)
        except (MessageTooLarge, MemoryError) as error:  # it still waits for an answer, and a small one there may be
            refusals.tell(f"an answer was not sent: {error}")
            listener.send(peer, session, Failure(type(error).__name__, str(error)[:4096]), timeout_s=timeout_s)
    except (PeerLost, PeerTimeout, MessageTooLarge, MemoryError) as error:
        refusals.tell(f"could not answer: {error}")
