"""Log lines for people (`text`) or machines (`json`, one object a line), on standard error."""

import json
import logging
from datetime import UTC, datetime

from aiohttp.http_exceptions import HttpProcessingError

from worker.printable import printable
from worker.settings import WorkerSettings

# What these tell while they reconnect and rebalance is no news: failures that matter are raised.
QUIET = {"faust": logging.ERROR, "mode": logging.ERROR, "aiokafka": logging.CRITICAL}

# Not even `debug` tells more: these write down each request to a broker, and one of them holds the
# password.
SECRETIVE = {"aiokafka.conn": logging.INFO}

# What faust says of partitions that a rebalance has just brought: it counts from the worker's start
# and not from theirs. The worker watches its own progress (worker/health.py).
FALSE_ALARM = "Aiokafka has not sent fetch request"


def _is_news(record: logging.LogRecord) -> bool:
    return FALSE_ALARM not in record.getMessage()


def _is_of_ours(record: logging.LogRecord) -> bool:
    """Not what aiohttp says, with a traceback, of nonsense that somebody asked of our port."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class TextFormatter(logging.Formatter):
    """For people; what others wrote, as in a traceback, steers no terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def configure(settings: WorkerSettings) -> None:
    """Set up logging for this process."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter()
        if settings.log_format == "json"
        else TextFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    handler.addFilter(_is_of_ours)
    levels = SECRETIVE
    if settings.log_level != "debug":
        levels = QUIET
        handler.addFilter(_is_news)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
