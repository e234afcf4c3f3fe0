"""Files from the network: resumed, retried, checked, and under their name only when whole."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from barelm import host
from barelm.run import Progress, UserError

if TYPE_CHECKING:
    from pathlib import Path

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") + "/"
PATIENCE = 30  # seconds without a byte of a server's
PIECE = 1 << 16  # bytes between two lines of progress
# Answers of 400 to 499 say that the same request will be refused again, but for these: the server
# waited too long, our part was longer than its file (and is emptied by now), too many requests.
WORTH_ANOTHER_TRY = (408, 416, 429)


@dataclass
class Failure:
    """Why a file did not come, in words for the user."""

    why: str
    status: int = 0  # of HTTP; 0: no answer came
    is_final: bool = False  # whether to ask again is of no use


def download(url: str, path: Path, sha256: str | None = None, tries: int = 5,
             headers: dict | None = None, optional: bool = False) -> Path | None:  # fmt: skip
    """Fetch url into path: resumed, retried, checked, and under its name only when it is whole.
    None where it is optional and the server has no such file."""
    if path.exists():
        return path
    part = path.with_name(path.name + ".part")
    progress = Progress()
    for attempt in range(1, tries + 1):
        failure = try_fetch(url, part, progress, headers or {})
        if failure is None:
            break
        if optional and failure.status == 404:
            return None
        if failure.is_final:
            raise UserError(f"{url}: {failure.why}")
        if attempt == tries:
            times = ""
            if tries > 1:
                times = f", {tries} times: run it again to go on"
            raise UserError(f"{url}: {failure.why}{times}")
        progress.note(f"{url}: {failure.why}; trying again ({attempt + 1} of {tries})")
        time.sleep(min(2 ** (attempt - 1), 30))  # 1, 2, 4, … s: a busy server gets some rest
    progress(f"{path.name}: {part.stat().st_size / 1e6:,.1f} MB", last=True)
    if sha256:
        check_sha256(url, part, sha256)
    host.replace(part, path)
    return path


def try_fetch(url: str, part: Path, progress: Progress, headers: dict) -> Failure | None:
    """One try of a download: None when the file `part` is whole, else a Failure."""
    import requests  # here, since most runs need none of it

    try:
        fetch(url, part, progress, headers)
    except requests.RequestException as error:  # before OSError and ValueError, which it may be too
        status = 0
        if error.response is not None:  # `if error.response`: false of a bad status
            status = error.response.status_code
        is_refused = 400 <= status < 500 and status not in WORTH_ANOTHER_TRY
        is_no_url = isinstance(error, ValueError)
        return Failure(why_no_answer(error, url), status, is_refused or is_no_url)
    except ValueError as error:  # of urllib3, which a few addresses meet
        return Failure(f"{str(error)[:100]}: is the address right?", is_final=True)
    except BrokenPipeError:  # of the progress line: the script ends as `config` says
        raise
    except OSError as error:
        raise UserError(f"{part}: cannot be written: {error.strerror}") from None
    return None


def fetch(url: str, part: Path, progress: Progress, headers: dict) -> None:
    """Add to the file `part` what it lacks of url, or raise a requests.RequestException."""
    import requests

    n_bytes = 0  # that the part has
    if part.exists():
        n_bytes = part.stat().st_size
    headers = headers | {"Accept-Encoding": "identity"}  # so that Content-Length counts our bytes
    if n_bytes:
        headers["Range"] = f"bytes={n_bytes}-"
    with requests.get(url, headers=headers, stream=True, timeout=PATIENCE) as answer:
        if answer.status_code == 416 and n_bytes:  # the part is longer than the file, or all of it
            os.truncate(part, 0)
        answer.raise_for_status()
        if answer.status_code != 206:
            n_bytes = 0  # the server does not resume: from the beginning
        size = None  # of the whole file: not every server says it
        length = answer.headers.get("Content-Length")
        if length:
            size = n_bytes + int(length)
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if n_bytes else "wb") as file:
            for piece in answer.iter_content(PIECE):
                file.write(piece)
                n_bytes += len(piece)
                total = size or n_bytes
                progress(f"{part.stem}: {n_bytes / 1e6:,.1f} of {total / 1e6:,.1f} MB")
            file.flush()
            os.fsync(file.fileno())  # its name will say that it is whole
    if size is not None and n_bytes != size:
        raise requests.ConnectionError(f"{n_bytes} of {size} bytes came")


def check_sha256(url: str, part: Path, sha256: str) -> None:
    """Remove the file `part`, and say so, where its hash is another one."""
    actual = hashlib.sha256(part.read_bytes()).hexdigest()
    if actual != sha256:
        part.unlink()
        raise UserError(f"{url}: removed: its sha256 is {actual}, not {sha256}")


# --------------------------------------------------------------------------------------------------
# What went wrong, in words


def why_no_answer(error: BaseException, url: str) -> str:
    """What a requests.RequestException means, in a few words, and what to do about it."""
    from requests import exceptions

    if isinstance(error, exceptions.TooManyRedirects):
        return "it leads in a circle: is the address right?"
    if error.response is not None:
        return why_refused(error.response.status_code)
    if isinstance(error, ValueError):  # what is no URL
        return f"{' '.join(str(error).split())[:100]}: is the address right?"
    return why_unreachable(error, url)


def why_unreachable(error: BaseException, url: str) -> str:
    """What a requests.RequestException without an answer means, and what to do about it."""
    from requests import exceptions

    if error.request is not None:
        url = error.request.url  # another one after a redirect
    host = urlsplit(url).hostname
    cause = system_error(error)
    reason = getattr(cause, "verify_message", None) or getattr(cause, "strerror", None)
    because = ""
    if reason:
        because = f" ({reason})"
    if isinstance(error, exceptions.ProxyError):
        return f"the proxy cannot be reached{because}: are HTTP_PROXY and HTTPS_PROXY right?"
    if isinstance(error, exceptions.SSLError):
        advice = "REQUESTS_CA_BUNDLE names a file of certificates to trust"
        return f"no secure connection to {host}{because}: {advice}"
    if isinstance(error, exceptions.Timeout) or "timed out" in str(error):
        return f"{host} does not answer in time: is there a network?"
    if isinstance(cause, socket.gaierror):
        return f"{host} is not found{because}: is there a network, and the name right?"
    if isinstance(cause, ConnectionResetError):
        return f"{host} cut the connection"
    if cause is not None:
        return f"{host} cannot be reached{because}: is there a network, and the address right?"
    if isinstance(error, exceptions.ContentDecodingError):
        return f"{host} sent what cannot be unpacked"
    if error.args and isinstance(error.args[0], str):
        return error.args[0]  # as `fetch` says it
    return f"{host} cut the connection"


def why_refused(status: int) -> str:
    """What a server's answer of this status means, and what to do about it."""
    if status in (401, 403):
        hint = "it is not there, or not without a token: HF_TOKEN holds the one for the Hub"
    elif status == 404:
        hint = "there is no such file: is the address right?"
    elif status == 407:
        hint = "the proxy wants a name and a password, in HTTPS_PROXY"
    elif status == 429:
        hint = "too many requests: try it later"
    elif status >= 500:
        hint = "the server has failed: try it later"
    else:
        hint = "is the address right?"
    return f"HTTP {status}: {hint}"


def system_error(error: BaseException) -> BaseException | None:
    """The operating system's OSError below requests' and urllib3's errors, or None."""
    below = [getattr(error, name, None) for name in ("__cause__", "reason", "original_error")]
    for cause in [*below, *error.args]:
        if isinstance(cause, Exception):
            deeper = system_error(cause)
            if deeper is not None:
                return deeper
    # requests' errors are OSErrors by their class, but none of the system's.
    is_systems = type(error).__module__ in ("builtins", "socket", "ssl")
    if is_systems and isinstance(error, OSError):
        return error
    return None
