"""Files from the network: resumed, retried, checked, and under their name only when whole."""

import hashlib
import os
import socket
import time
from urllib.parse import urlsplit

from barelm.run import Progress, UserError

HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") + "/"
PATIENCE = 30  # seconds without a byte of a server's


def download(url, path, sha256=None, tries=5, headers=None, optional=False):
    """Fetch url into path: resumed, retried, checked, and under its name only when it is whole.
    None where it is optional and the server has no such file."""
    import requests  # here, since most runs need none of it

    if path.exists():
        return path
    part, show = path.with_name(path.name + ".part"), Progress()
    for attempt in range(1, tries + 1):
        try:
            fetch(url, part, show, headers or {})
            break
        except requests.RequestException as error:
            status = error.response.status_code if error.response is not None else 0
            if optional and status == 404:
                return None
            why = why_no_answer(error, url)
            refused = 400 <= status < 500 and status not in (408, 416, 429)
            if refused or isinstance(error, ValueError):  # requests': what is no URL
                raise UserError(f"{url}: {why}") from None
            if attempt == tries:
                times = f", {tries} times: run it again to go on" if tries > 1 else ""
                raise UserError(f"{url}: {why}{times}") from None
            show.note(f"{url}: {why}; trying again ({attempt + 1} of {tries})")
            time.sleep(min(2 ** (attempt - 1), 30))
        except ValueError as error:  # of urllib3, which a few addresses meet
            raise UserError(f"{url}: {str(error)[:100]}: is the address right?") from None
        except BrokenPipeError:  # of the progress line: the script ends as `config` says
            raise
        except OSError as error:
            raise UserError(f"{part}: cannot be written: {error.strerror}") from None
    show(f"{path.name}: {part.stat().st_size / 1e6:,.1f} MB", last=True)
    if sha256 and (found := hashlib.sha256(part.read_bytes()).hexdigest()) != sha256:
        part.unlink()
        raise UserError(f"{url}: removed: its sha256 is {found}, not {sha256}")
    os.replace(part, path)
    return path


def why_no_answer(error, url):
    """What a requests.RequestException means, in a few words, and what to do about it."""
    from requests import exceptions

    if isinstance(error, exceptions.TooManyRedirects):
        return "it leads in a circle: is the address right?"
    if error.response is not None:
        return why_refused(error.response.status_code)
    if isinstance(error, ValueError):  # what is no URL
        return f"{' '.join(str(error).split())[:100]}: is the address right?"
    asked = error.request.url if error.request is not None else url  # others after a redirect
    host, cause = urlsplit(asked).hostname, system_error(error)
    reason = getattr(cause, "verify_message", None) or getattr(cause, "strerror", None)
    because = f" ({reason})" if reason else ""
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


def why_refused(status):
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


def system_error(error):
    """The operating system's OSError below requests' and urllib3's errors, or None."""
    names = ("__cause__", "reason", "original_error")
    for cause in [*(getattr(error, name, None) for name in names), *error.args]:
        found = system_error(cause) if isinstance(cause, Exception) else None
        if found is not None:
            return found
    own = type(error).__module__ in ("builtins", "socket", "ssl")
    return error if own and isinstance(error, OSError) else None


def fetch(url, part, show, headers):
    """Add to the file `part` what it lacks of url, or raise a requests.RequestException."""
    import requests

    have = part.stat().st_size if part.exists() else 0
    headers = headers | ({"Range": f"bytes={have}-"} if have else {})
    headers["Accept-Encoding"] = "identity"  # so that Content-Length counts the bytes we write
    with requests.get(url, headers=headers, stream=True, timeout=PATIENCE) as answer:
        if answer.status_code == 416 and have:  # the part is longer than the file, or all of it
            os.truncate(part, 0)
        answer.raise_for_status()
        if answer.status_code != 206:
            have = 0  # the server does not resume: from the beginning
        length = answer.headers.get("Content-Length")
        size = have + int(length) if length else None
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab" if have else "wb") as file:
            for piece in answer.iter_content(1 << 16):
                file.write(piece)
                have += len(piece)
                show(f"{part.stem}: {have / 1e6:,.1f} of {(size or have) / 1e6:,.1f} MB")
            file.flush()
            os.fsync(file.fileno())  # its name will say that it is whole
    if size is not None and have != size:
        raise requests.ConnectionError(f"{have} of {size} bytes came")
