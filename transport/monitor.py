"""A ZeroMQ socket's events, as another socket that is read."""

from __future__ import annotations

import zmq


def open_monitor(of: zmq.Socket, events: int) -> zmq.Socket:
    """Ends with ``of.disable_monitor()``; the caller closes it.  `of` has a context of its own.

    pyzmq's own `get_monitor_socket` has a limit on unread events; there libzmq's thread would wait for the reader,
    and with it everybody's messages.
    """
    of.monitor("inproc://monitor", events)
    monitor = of.context.socket(zmq.PAIR)
    monitor.rcvhwm = 0
    monitor.connect("inproc://monitor")
    return monitor
