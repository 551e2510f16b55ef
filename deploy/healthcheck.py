"""A container's healthcheck: `python healthcheck.py URL` exits 0 when the URL answers 200."""

import sys
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

TIMEOUT_S = 4


def main(url: str) -> int:
    """Ask once; the answer is printed, since `docker inspect` keeps what a healthcheck says."""
    try:
        # Past the proxy that an engine may give every container: it can't reach this one's port.
        with build_opener(ProxyHandler({})).open(url, timeout=TIMEOUT_S) as response:
            sys.stdout.write(response.read().decode())
    except HTTPError as error:
        sys.stdout.write(error.read().decode())
        return 1
    except OSError as error:
        sys.stdout.write(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
