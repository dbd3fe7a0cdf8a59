"""A network between a pool and a server that a test can stop and let go on."""

from __future__ import annotations

import asyncio
from contextlib import suppress


class PausingProxy:
    """Forwards connections to a port of loopback.

    While it is paused, connections are taken and nothing goes through, in either direction; what
    was on its way arrives when it goes on. Made in the event loop that it runs in.

    Attributes:
        url: where it listens, once it is started.
    """

    def __init__(self, port: int) -> None:
        self.url = ""
        self._port = port
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> PausingProxy:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def pause(self) -> None:
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, here: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with suppress(OSError):
            await self._open.wait()
            there, to = await asyncio.open_connection("127.0.0.1", self._port)
            await asyncio.gather(self._pump(here, to), self._pump(there, back))
        back.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(2**16):
                await self._open.wait()
                sink.write(data)
                await sink.drain()
        sink.close()
