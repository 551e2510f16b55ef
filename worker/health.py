"""The worker's own port: `/metrics`, `/health/live`, `/health/ready`, and nothing else.

Live means progress while there is lag: a worker whose consumer died silently answers HTTP, has
events to work on, and finishes none. An event that is worked on has until its own deadline, so that
a slow one ends as a dead letter and not with the worker.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from worker.batch.batcher import Batcher
from worker.errors import SettingsInvalid
from worker.kafka.consumer import Consumer
from worker.kafka.lag import LagProbe
from worker.metrics import Metrics
from worker.settings import HttpSettings, WorkerSettings

# Each takes a descriptor, and fetches need some as well.
MAX_CONNECTIONS = 64
# Of answers under way; whoever does not read theirs would hold up the end of the worker.
SHUTDOWN_TIMEOUT_S = 1.0


@dataclass
class Health:
    """What makes the worker live and ready; each reason is a sentence, None means all is well."""

    settings: WorkerSettings
    probe: LagProbe
    consumer: Consumer
    batcher: Batcher
    stopping: bool = False

    def why_not_live(self) -> str | None:
        if not self.batcher.live:
            return "the device is lost: batches hang on it or fail"
        stalled_s = self.probe.stalled_s()
        if stalled_s > self._patience_s():
            return f"no progress for {stalled_s:.0f} s with {self.probe.lag} events of lag"
        return None

    def _patience_s(self) -> float:
        """Seconds without progress that are in order.

        Every attempt at a track begins with some progress (a track before it ended or rests), so
        where one is worked on, progress may be as far off as the end of that attempt.
        """
        worker = self.settings
        if self.consumer.in_flight == 0:
            return worker.stalled_after_s
        return max(worker.stalled_after_s, worker.track_deadline_s + worker.backoff_max_s)

    def why_not_ready(self) -> str | None:
        if self.stopping:
            return "stopping"
        if not self.consumer.assigned:
            return "no partitions assigned (yet, or during a rebalance)"
        if not self.batcher.healthy:
            return "the last batch hung on the device"
        unmeasured_s = self.probe.unmeasured_s()
        if unmeasured_s > self.settings.stalled_after_s:
            return f"Kafka could not be asked for the lag for {unmeasured_s:.0f} s (see the log)"
        return self.why_not_live()


class HttpServer:
    """Serves metrics and health on `settings.host:settings.port`; `port` tells the one taken."""

    def __init__(self, settings: HttpSettings, metrics: Metrics, health: Health) -> None:
        self._settings = settings
        self._metrics = metrics
        app = web.Application()
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_get("/health/live", partial(_answer, health.why_not_live))
        app.router.add_get("/health/ready", partial(_answer, health.why_not_ready))
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
        self._listener: asyncio.Server
        self.port = settings.port

    async def __aenter__(self) -> Self:
        """Listen.

        Raises
        ------
        SettingsInvalid
            The port is taken, or the address is not this machine's.
        """
        host, port = self._settings.host, self._settings.port
        await self._runner.setup()
        try:
            self._listener = await asyncio.get_running_loop().create_server(
                self._accept, host, port
            )
        except OSError as error:
            await self._runner.cleanup()
            raise SettingsInvalid(
                f"Metrics and health can't be served on {host}:{port} ({error.strerror}); "
                "set TIMBRE_HTTP__HOST and TIMBRE_HTTP__PORT, 0 for any free port."
            ) from error
        self.port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._listener.close()
        await self._runner.cleanup()

    def _accept(self) -> asyncio.Protocol:
        """One more connection; where they are too many the oldest go, as they may never ask."""
        server = self._runner.server
        assert server is not None, "the runner is set up"
        for oldest in server.connections[:-MAX_CONNECTIONS]:
            oldest.force_close()
        return server()

    async def _get_metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )


async def _answer(why_not: Callable[[], str | None], _: web.Request) -> web.Response:
    trouble = why_not()
    return web.json_response(
        {"status": "ok" if trouble is None else "unavailable", "reason": trouble},
        status=200 if trouble is None else 503,
    )
