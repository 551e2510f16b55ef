"""A small HTTP server with music, for a worker to fetch from.

python -m worker.demo.server PORT FOLDER
"""

import os
import sys
from pathlib import Path
from urllib.parse import quote

from aiohttp import web

from worker.services.service import HOST

READY = "Serving music"


def url(port: int, name: str) -> str:
    """Where the server has the file `name`, relative to its folder."""
    return f"http://{HOST}:{port}/{quote(os.fsencode(name))}"


def serve(port: int, folder: Path) -> None:
    """Serve `folder` until SIGTERM; nothing outside it, and no listing of it."""
    app = web.Application()
    app.router.add_static("/", folder)
    web.run_app(app, host=HOST, port=port, access_log=None, print=_announce)


def _announce(_: str) -> None:
    sys.stdout.write(READY + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]))
