"""The proxy: an asyncio TCP server that fires many invocations at once.

A wide fan-out costs whoever invokes it half a millisecond of CPU per event, and an executor's first
one 0.2 s to load a client of AWS; it is billed while it does so. The proxy takes the events in one
frame and fires them itself. It is a convenience and never a dependency: the records exist before
the events, so a peer that cannot reach it invokes for itself. For the same reason it is the one to
see jobs through whose client is gone: it runs for longer than they do, and can invoke.
"""

from wukong_async.proxy.server import ProxyServer

__all__ = ["ProxyServer"]
