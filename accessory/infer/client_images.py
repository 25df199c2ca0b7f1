"""The images in what a client of the server asks: data: URIs; from other machines only those that are allowed, by name."""

import urllib.error
import urllib.request
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn
from urllib.parse import urlsplit

from accessory.errors import UserError
from accessory.visual.images import MOST_BYTES, is_data_uri, is_on_the_web, open_image, shortened

FETCH_S = 10.0
Message = Mapping[str, Any]


def allowed_images(messages: Sequence[Message], hosts: Collection[str]) -> list[dict[str, Any]]:
    """The messages, with what lies on one of ``hosts`` fetched.

    Raises:
        UserError: an image is of another sort; this server's own files above all are none of a client's.
    """
    return [
        {**message, "content": [_allowed(part, hosts) for part in content]}
        if isinstance(content := message.get("content"), list)
        else dict(message)
        for message in messages
    ]


def _allowed(part: Any, hosts: Collection[str]) -> Any:
    if not isinstance(part, Mapping) or part.get("type") == "text":
        return part
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, Mapping) else url
    if part.get("type") != "image_url" or not isinstance(url, str) or is_data_uri(url):
        if "image" in part:  # a path, if it were read
            raise UserError('an image must be {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}')
        return part
    if not is_on_the_web(url):
        raise UserError(f"an image must be a data: URI with its bytes, found {shortened(url)!r}")
    if urlsplit(url).hostname not in hosts:
        raise UserError(
            f"images on other machines are not fetched ({shortened(url)}): send the bytes as a data: URI, or let the server "
            "be started with --allow-image-host for this one"
        )
    return {"type": "image", "image": open_image(_fetch(url))}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An allowed machine may not send the server to another one."""

    def redirect_request(self, *_: Any, **__: Any) -> NoReturn:
        raise UserError("it is moved elsewhere")


def _fetch(url: str) -> bytes:
    # of the environment's proxies none: they could be inside of what a client may not reach
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
    try:
        with opener.open(url, timeout=FETCH_S) as answer:
            found: bytes = answer.read(MOST_BYTES + 1)  # what is longer is refused as too large
    except (OSError, UserError, ValueError) as error:
        raise UserError(f"image {shortened(url)}: cannot be fetched: {error}") from error
    return found
