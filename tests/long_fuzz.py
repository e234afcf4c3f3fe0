"""Thousands of requests that schemathesis makes of /openapi.json, at a server that runs:

    python serve.py --model=out/tiny --max_len=48 --max_queue=4
    python tests/long_fuzz.py http://127.0.0.1:8000 300

Each address gets so many requests that its schema allows and as many that it does not. An answer
must be what the schema says, with no status of 500 and above; what is malformed is refused; what is
well-formed is answered, or refused for one of test_openapi.TOGETHER's reasons."""

import sys

import requests
from test_openapi import FUZZED, fuzz


def main():
    if len(sys.argv) != 3 or not sys.argv[2].isdecimal():
        sys.exit("usage: python tests/long_fuzz.py http://127.0.0.1:8000 300")
    url, n = sys.argv[1:]
    for path in FUZZED:
        print(path, fuzz(url, int(n), [path]), flush=True)
    failed = [line for line in requests.get(f"{url}/metrics").text.splitlines() if 'us="5' in line]
    print("statuses of 500 and above:", *(failed or ["none"]))


if __name__ == "__main__":
    main()
