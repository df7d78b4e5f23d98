"""A small server of the gs protocol's JSON interface, which holds objects in memory.

It serves what gcsfs, Orbax, tensorstore and tensorboardX ask for: objects with
generations and preconditions, listings, ranges, both kinds of uploads, moves, copies,
and batches of deletions. Source: https://cloud.google.com/storage/docs/json_api/v1.
"""

import base64
import contextlib
import dataclasses
import email
import hashlib
import http.server
import itertools
import json
import os
import re
import threading
import urllib.parse

import pytest

google_crc32c = pytest.importorskip("google_crc32c")

BUCKET = "bucket"
# gcsfs reads it when it is imported: whether to ask what kind of bucket it is.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
_DATE = "2026-01-01T00:00:00.000000Z"


@dataclasses.dataclass(frozen=True)
class Stored:
    content: bytes
    generation: int


class Refused(Exception):
    """An answer with an error status."""

    def __init__(self, status):
        super().__init__(status)
        self.status = status


class Store:
    """The objects of one bucket, and what was requested.

    Attributes:
      objects: objects by name.
      asked: method and decoded path of every request.
      read: names of the objects that were read, with the bytes sent for each.
      forbids: whether every request is refused.
    """

    def __init__(self):
        self.objects, self.asked, self.read = {}, [], {}
        self.forbids = False
        self._numbers, self._uploads = itertools.count(1), {}
        self._lock = threading.RLock()

    def metadata(self, name):
        stored = self.objects[name]
        crc = google_crc32c.value(stored.content).to_bytes(4, "big")
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "size": str(len(stored.content)),
            "generation": str(stored.generation),
            "metageneration": "1",
            "updated": _DATE,
            "timeCreated": _DATE,
            "crc32c": base64.b64encode(crc).decode(),
            "md5Hash": base64.b64encode(
                hashlib.md5(stored.content).digest()  # noqa: S324
            ).decode(),
        }

    def write(self, name, content, query):
        with self._lock:
            self._check(name, query)
            self.objects[name] = Stored(content, next(self._numbers))
            return self.metadata(name)

    def delete(self, name, query):
        with self._lock:
            self._check(name, query)
            if name not in self.objects:
                raise Refused(404)
            del self.objects[name]

    def get(self, name, query=()):
        stored = self.objects.get(name)
        if stored is None:
            raise Refused(404)
        if dict(query).get("generation", str(stored.generation)) != str(
            stored.generation
        ):
            raise Refused(404)
        if dict(query).get("ifGenerationNotMatch") == str(stored.generation):
            raise Refused(304)
        self._check(name, dict(query))
        return stored

    def _check(self, name, query):
        """Raises Refused unless the precondition on the generation holds."""
        stored = self.objects.get(name)
        now = str(stored.generation if stored else 0)
        if query.get("ifGenerationMatch", now) != now:
            raise Refused(412)

    def names(self, query):
        """Returns the items and prefixes of a listing."""
        prefix, split = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], []
        with self._lock:
            for name in sorted(self.objects):
                if not name.startswith(prefix):
                    continue
                if not query.get("startOffset", "") <= name:
                    continue
                if query.get("endOffset") and name >= query["endOffset"]:
                    continue
                rest = name[len(prefix) :]
                if split and split in rest:
                    prefixes.append(prefix + rest.partition(split)[0] + split)
                else:
                    items.append(self.metadata(name))
        found = {"kind": "storage#objects", "items": items}
        return found | {"prefixes": list(dict.fromkeys(prefixes))}

    def begin(self, name, query):
        key = str(next(self._numbers))
        self._uploads[key] = name, query, bytearray()
        return key

    def add(self, key, content, span):
        """Adds a part of a resumable upload; returns metadata after the last."""
        name, query, held = self._uploads[key]
        held += content
        if span and span.endswith("/*"):
            return len(held)
        return self.write(name, bytes(held), query)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body leave together; a client would wait 40 ms between the two.
    disable_nagle_algorithm = True
    wbufsize = -1

    @property
    def store(self):
        return self.server.store

    def log_message(self, *args):
        pass

    def handle(self):
        # A client may close a connection at any time.
        with contextlib.suppress(ConnectionError):
            super().handle()

    def finish(self):
        with contextlib.suppress(ConnectionError):
            super().finish()

    def _answer(self):
        body = self._body()
        where = urllib.parse.urlsplit(self.path)
        self.store.asked.append((self.command, urllib.parse.unquote(self.path)))
        query = dict(urllib.parse.parse_qsl(where.query, keep_blank_values=True))
        try:
            if self.store.forbids:
                raise Refused(403)
            for method, pattern, act in ROUTES:
                found = re.fullmatch(pattern, where.path)
                if method == self.command and found:
                    names = [urllib.parse.unquote(one) for one in found.groups()]
                    return act(self, query, body, *names)
            raise Refused(501)
        except Refused as error:
            self._send(error.status, {"error": {"message": str(error.status)}})

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status, content=None, headers=()):
        is_json = isinstance(content, dict | list)
        body = json.dumps(content).encode() if is_json else content or b""
        self.send_response(status)
        kind = "application/json" if is_json else "application/octet-stream"
        for name, value in {"Content-Type": kind, **dict(headers)}.items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(body)

    def bucket(self, query, body, bucket):
        if bucket != BUCKET:
            raise Refused(404)
        self._send(200, {"kind": "storage#bucket", "name": bucket, "id": bucket})

    def list(self, query, body, bucket):
        if bucket != BUCKET:
            raise Refused(404)
        self._send(200, self.store.names(query))

    def get(self, query, body, bucket, name):
        stored = self.store.get(name, query)
        if query.get("alt") != "media" and not self.path.startswith("/download"):
            return self._send(200, self.store.metadata(name))
        content, status, headers = stored.content, 200, {}
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if span:
            first, last = span.groups()
            start = int(first) if first else max(0, len(content) - int(last))
            end = int(last) + 1 if first and last else len(content)
            if start >= len(content):
                raise Refused(416)
            end = min(end, len(content))
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
            content, status = content[start:end], 206
        headers["X-Goog-Generation"] = str(stored.generation)
        self.store.read[name] = self.store.read.get(name, 0) + len(content)
        self._send(status, content, headers)

    def delete(self, query, body, bucket, name):
        self.store.delete(name, query)
        self._send(204)

    def move(self, query, body, bucket, name, target):
        content = self.store.get(name).content
        made = self.store.write(target, content, {})
        self.store.delete(name, {})
        self._send(200, made)

    def copy(self, query, body, bucket, name, target_bucket, target):
        made = self.store.write(target, self.store.get(name).content, {})
        self._send(200, {"done": True, "resource": made})

    def upload(self, query, body, bucket):
        if bucket != BUCKET:
            raise Refused(404)
        kind = query.get("uploadType")
        if kind == "media":
            return self._send(200, self.store.write(query["name"], body, query))
        if kind == "multipart":
            name, content = _parts(self.headers["Content-Type"], body)
            return self._send(200, self.store.write(name, content, query))
        given = json.loads(body or b"{}")
        key = self.store.begin(query.get("name") or given["name"], query)
        host = self.headers["Host"]
        place = f"http://{host}/upload/storage/v1/b/{bucket}/o?upload_id={key}"
        self._send(200, {}, {"Location": place})

    def add(self, query, body, bucket):
        made = self.store.add(
            query["upload_id"], body, self.headers.get("Content-Range")
        )
        if isinstance(made, int):
            return self._send(308, b"", {"Range": f"bytes=0-{made - 1}"})
        self._send(200, made)

    def post(self, query, body, bucket):
        act = self.add if "upload_id" in query else self.upload
        act(query, body, bucket)

    def batch(self, query, body):
        answers = []
        for line in re.findall(rb"DELETE /storage/v1/b/(\S+) HTTP", body):
            name = urllib.parse.unquote(line.decode().partition("/o/")[2])
            name = name.partition("?")[0]
            self.store.asked.append(("DELETE", name))
            try:
                self.store.delete(name, {})
                status = "204 No Content"
            except Refused:
                status = '404 Not Found\r\n\r\n{"error": {}}'
            answers.append(
                f"--edge\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n"
            )
        content = "".join([*answers, "--edge--"]).encode()
        self._send(200, content, {"Content-Type": "multipart/mixed; boundary=edge"})


def _parts(kind, body):
    """Returns the name and the content of an upload in two parts."""
    edge = email.message_from_string(f"Content-Type: {kind}\n\n").get_boundary()
    _, first, rest = body.split(f"--{edge}".encode(), 2)
    head = re.split(rb"\r?\n\r?\n", first.strip(b"\r\n"), maxsplit=1)[1]
    content = re.split(rb"\r?\n\r?\n", rest.lstrip(b"\r\n"), maxsplit=1)[1]
    content = content[: content.rindex(f"--{edge}--".encode())]
    return json.loads(head)["name"], re.sub(rb"\r?\n\Z", b"", content)


_B = r"/storage/v1/b/([^/]+)"
ROUTES = (
    ("GET", _B, Handler.bucket),
    ("GET", _B + "/o", Handler.list),
    ("GET", f"(?:/download)?{_B}/o/([^/]+)", Handler.get),
    ("DELETE", _B + "/o/([^/]+)", Handler.delete),
    ("POST", _B + "/o/([^/]+)/moveTo/o/([^/]+)", Handler.move),
    ("POST", _B + "/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)", Handler.copy),
    ("POST", f"/upload{_B}/o", Handler.post),
    ("PUT", f"/upload{_B}/o", Handler.post),
    ("POST", "/batch/storage/v1", Handler.batch),
)


def variables(address):
    """Returns the variables with which all libraries ask a server at an address."""
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "NO_GCE_CHECK": "true",
        "GCE_METADATA_HOST": "localhost:1",
    }


@contextlib.contextmanager
def serving():
    """Yields the store and the address of a server; sets the variables meanwhile."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.store, server.daemon_threads = Store(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    before = {name: os.environ.get(name) for name in variables(address)}
    os.environ.update(variables(address))
    try:
        yield server.store, address
    finally:
        server.shutdown()
        server.server_close()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
