"""The HTTP client below the calls to an endpoint: it reads so much and no more, and goes to no other address."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from openai import DefaultAsyncHttpxClient

KEPT = ("retry-after",)
"""Headers of an answer that are passed on."""


class RefusedAnswerError(Exception):
    """An answer that is not read to its end.

    Args:
        reason: one word for the metrics.
        detail: what is wrong with it.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class BoundedClient(DefaultAsyncHttpxClient):
    """Follows no redirects, asks for no compression, and takes no answer that is larger than it may be.

    Args:
        limit: most bytes of the body of one answer.
        timeout: seconds without progress; the whole of a call is bounded by its caller.
        url: of the server. One on this machine is not asked by way of the proxy that the environment names.
    """

    def __init__(self, limit: int, timeout: float, url: str) -> None:
        here = is_here(url)
        headers = {"Accept-Encoding": "identity"}
        super().__init__(timeout=timeout, follow_redirects=False, headers=headers, trust_env=not here)
        self._limit = limit

    async def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """The whole answer as JSON that is still to be read.

        Raises:
            RefusedAnswerError: "too_large", "compressed" or "redirect".
        """
        response = await super().send(request, stream=True, **options)
        try:
            self._check_headers(response)
            body = bytearray()
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > self._limit:
                    raise RefusedAnswerError("too_large", f"an answer of more than {self._limit} bytes")
        finally:
            await response.aclose()
        kept = {name: response.headers[name] for name in KEPT if name in response.headers}
        headers = {"content-type": "application/json", **kept}
        return type(response)(response.status_code, headers=headers, content=bytes(body), request=request)

    @staticmethod
    def _check_headers(response: Any) -> None:
        if 300 <= response.status_code < 400:
            raise RefusedAnswerError(
                "redirect", f"it answers with a redirect (status {response.status_code}); name the final address"
            )
        coding = response.headers.get("content-encoding", "identity").strip().lower()
        if coding not in ("", "identity"):
            raise RefusedAnswerError("compressed", "a compressed answer, though none was asked for")


def is_here(url: str) -> bool:
    """Whether an address is this machine's own, which no proxy can reach."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def proxy_of(url: str) -> str | None:
    """Host and port of the proxy that the environment names for an address, without its password."""
    parts, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or is_here(url) or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    return urlsplit(proxy if "://" in proxy else f"//{proxy}").netloc.rpartition("@")[2]
