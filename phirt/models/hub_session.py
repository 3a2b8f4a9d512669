"""Requests to a Hugging Face hub: whose address, whose token, how long, and how often.

The client is `huggingface_hub`'s own, so that its settings (proxies, certificates, a client
that an application has set) hold here too. What is decided here is what it leaves open:
that no credentials follow a redirect to another host, that every answer ends, and that a
fault is tried again a bounded number of times.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from phirt._version import __version__
from phirt.errors import ModelNotFoundError, UnsafeModelError
from phirt.silence import silence

if TYPE_CHECKING:
    import httpx2

__all__ = [
    "Patience",
    "RefusedError",
    "TransientError",
    "body",
    "endpoint",
    "open_url",
    "shown_endpoint",
]

_logger = logging.getLogger(__name__)

_TRIES = 5
_TRIES_TO_CONNECT = 2
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 16.0
_LONGEST_RETRY_AFTER_S = 300.0
_MOST_REDIRECTS = 5
_MOST_DRAINED_BYTES = 1 << 16
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# A peer that sends a byte now and then keeps every timeout of a socket from running out.
_SLOW_AFTER_S = 60.0
_SLOWEST_BYTES = 60_000


class TransientError(Exception):
    """The same request may succeed later.

    Attributes:
        wait_s: How long the hub asks to wait, if it does.
        connected: Whether the other side answered at all.
    """

    def __init__(self, reason: str, *, wait_s: float | None = None, connected: bool = True) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.connected = connected


class RefusedError(Exception):
    """The hub answered, and its answer is no.

    Attributes:
        status: The HTTP status.
        code: The hub's own word for the reason (``X-Error-Code``), if it gave one.
        message: The hub's own sentence, if it gave one.
        authenticated: Whether a token was sent.
    """

    def __init__(self, response: httpx2.Response, *, authenticated: bool) -> None:
        self.status = response.status_code
        self.code = response.headers.get("X-Error-Code", "")[:40]
        self.message = _plain(response.headers.get("X-Error-Message", ""))
        self.authenticated = authenticated
        super().__init__(f"HTTP {self.status}" + (f" ({self.message})" if self.message else ""))


class Patience:
    """Waits between the tries of one request, fewer times than a user's patience lasts.

    Args:
        what: What is being fetched, for the error.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._failures = 0
        self._connected = False

    def reset(self) -> None:
        """Count from the beginning: the last try brought something."""
        self._failures = 0
        self._connected = True

    def wait(self, error: TransientError) -> None:
        """Sleep before the next try.

        Raises:
            ModelNotFoundError: There have been enough tries.
        """
        self._failures += 1
        self._connected |= error.connected
        tries = _TRIES if self._connected else _TRIES_TO_CONNECT
        asked = error.wait_s or 0.0
        if self._failures >= tries or asked > _LONGEST_RETRY_AFTER_S:
            raise ModelNotFoundError(self._message(error, asked)) from error
        backoff = min(_FIRST_WAIT_S * 2 ** (self._failures - 1), _LONGEST_WAIT_S)
        _logger.info("%s: %s. Trying again.", self._what, error)
        time.sleep(max(asked, backoff))

    def _message(self, error: TransientError, asked: float) -> str:
        if asked > _LONGEST_RETRY_AFTER_S:
            return (
                f"{self._what} cannot be fetched now: {error}, and the hub asks to wait "
                f"{asked:.0f} seconds. Run it again after that; what has been fetched is kept."
            )
        times = f"{self._failures} times" if self._failures > 1 else "once"
        return (
            f"{self._what} cannot be fetched from {shown_endpoint()}, tried {times}: {error}. "
            "Check the network, the settings of proxy and certificates (HTTPS_PROXY, NO_PROXY, "
            "SSL_CERT_FILE) and HF_ENDPOINT, then run it again; what has been fetched is kept."
        )


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT as it is now, or that of huggingface_hub.

    Raises:
        ModelNotFoundError: It is no address.
    """
    silence("huggingface_hub")
    from huggingface_hub import constants

    address = os.environ.get("HF_ENDPOINT") or constants.HUGGINGFACE_CO_URL_HOME
    try:  # here, since huggingface_hub fails on it when it is imported, and says no more
        _ = urlsplit(address).port
    except ValueError as error:
        raise ModelNotFoundError(f"HF_ENDPOINT is no address of a hub: {error}.") from error
    return address.rstrip("/")


def shown_endpoint() -> str:
    """The hub's address, for an error: without a password that may be in it."""
    return re.sub(r"//[^/]*@", "//", endpoint())


@contextmanager
def open_url(url: str, *, first_byte: int = 0) -> Iterator[httpx2.Response]:
    """GET an address of the hub, following redirects; the body is left to `body`.

    The token is sent to the host of `url` only, never to one that it redirects to.

    Args:
        url: The address, at the hub.
        first_byte: Ask for what follows, by a Range header. The hub may ignore that: see
            the status, 206 or 200.

    Raises:
        TransientError: It may work later.
        RefusedError: The answer is no.
        ModelNotFoundError: The network is not to be used, or cannot be.
        UnsafeModelError: The answer is compressed, though that was not asked for.
    """
    with _translated():
        response, authenticated = _follow(url, first_byte)
        try:
            if response.status_code in _TRANSIENT:
                reason = f"the hub answered HTTP {response.status_code}"
                raise TransientError(reason, wait_s=_wait_asked_for(response))
            if response.status_code not in {200, 206}:
                raise RefusedError(response, authenticated=authenticated)
            encoding = response.headers.get("Content-Encoding", "identity").lower()
            if encoding != "identity":
                # Never opened: 1 KB of it may be 10 GB.
                raise UnsafeModelError(
                    f"{shown_endpoint()} sent an answer packed as {encoding[:20]!r}, which phirt "
                    "had asked it not to do. It was not used. Check HF_ENDPOINT and the proxy."
                )
            yield response
        finally:
            response.close()


def body(response: httpx2.Response) -> Iterator[bytes]:
    """The body as it comes, never decompressed.

    Raises:
        TransientError: The connection broke, stalled, or came to a crawl.
    """
    with _translated():
        since, count = time.monotonic(), 0
        for chunk in response.iter_raw():
            yield chunk
            count += len(chunk)
            elapsed = time.monotonic() - since
            if elapsed > _SLOW_AFTER_S:
                if count < _SLOWEST_BYTES:
                    raise TransientError(f"only {count:,} bytes came within {elapsed:.0f} seconds")
                since, count = time.monotonic(), 0


def _follow(url: str, first_byte: int) -> tuple[httpx2.Response, bool]:
    """The first answer that is no redirect, and whether a token was sent for it."""
    silence("huggingface_hub")
    import httpx2
    from huggingface_hub import constants

    headers = {
        # Of our own: huggingface_hub's names every installed package, and fetches a list to do so.
        "User-Agent": f"phirt/{__version__}",
        "Accept-Encoding": "identity",
    }
    if first_byte:
        headers["Range"] = f"bytes={first_byte}-"
    token = _token()
    address = httpx2.URL(url)
    hub = _origin(address)
    is_hub = True
    client = _client()
    for _ in range(_MOST_REDIRECTS):
        request = client.build_request(
            "GET", address, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        if is_hub:
            if token:
                request.headers["Authorization"] = f"Bearer {token}"
            response = client.send(request, stream=True, follow_redirects=False)
        else:
            # An application's own client may carry credentials by default.
            for name in ("Authorization", "Cookie"):
                request.headers.pop(name, None)
            response = client.send(request, auth=None, stream=True, follow_redirects=False)
        location = response.headers.get("Location")
        if response.status_code not in _REDIRECTS or not location:
            return response, bool(token)
        _finish(response)
        address = address.join(location)
        # Once away, away for good: what another host redirects to is that host's choice.
        is_hub = is_hub and _origin(address) == hub
    raise TransientError(f"the hub redirects more than {_MOST_REDIRECTS} times")


def _finish(response: httpx2.Response) -> None:
    """Be done with a redirect. Its connection serves the next request, if its body is read."""
    try:
        length = response.headers.get("Content-Length", "")
        if length.isdecimal() and int(length[:20]) <= _MOST_DRAINED_BYTES:
            for _ in response.iter_raw():
                pass
    finally:
        response.close()


def _client() -> httpx2.Client:
    silence("huggingface_hub")
    from huggingface_hub import get_session

    try:
        return get_session()
    except (ValueError, ImportError) as error:  # made at the first use, with the proxies
        raise ModelNotFoundError(
            f"No connection to a hub can be made: {_plain(str(error))}. Check the proxy settings "
            "(HTTPS_PROXY, HTTP_PROXY, ALL_PROXY)."
        ) from error


def _token() -> str | None:
    silence("huggingface_hub")
    from huggingface_hub import constants, get_token

    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


@contextmanager
def _translated() -> Iterator[None]:
    """Raise the client's errors as phirt's, or as `TransientError`."""
    silence("huggingface_hub")
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled, OIDCError

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ModelNotFoundError(
            "Hugging Face's library was told to stay offline when this program started "
            "(HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE). Start it again without."
        ) from error
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
        reason = f"no connection ({_plain(str(error)) or type(error).__name__})"
        raise TransientError(reason, connected=False) from error
    except httpx2.TimeoutException as error:
        raise TransientError("the hub sent nothing for a while") from error
    except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
        raise TransientError(f"the connection broke ({_plain(str(error))})") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.CookieConflict, OIDCError) as error:
        raise ModelNotFoundError(
            f"The hub cannot be asked: {_plain(str(error))}. Check HF_ENDPOINT, HF_TOKEN and the "
            "proxy settings (HTTPS_PROXY, NO_PROXY)."
        ) from error


def _wait_asked_for(response: httpx2.Response) -> float | None:
    """Seconds that the hub asks to wait: Retry-After, or what is left of its rate limit."""
    silence("huggingface_hub")
    # Lazily exported, which mypy does not see.
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    value = response.headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return float(value[:9])
    if value:
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    return float(limit.reset_in_seconds) if limit and not limit.remaining else None


def _plain(text: str) -> str:
    """A stranger's sentence, fit for one line of a terminal, without its last dot."""
    return re.sub(r"[^ -~]+", " ", text).strip().rstrip(".")[:200]
