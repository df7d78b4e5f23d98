"""Changes files of known formats into harmful inputs for `fuzz.py`.

Every function takes a `random.Random` first and returns a changed copy; the same
generator gives the same copy.
"""

import contextlib
import copy
import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

_MARK = "@raw@"
# Values that JSON's own writer would refuse or shorten.
_RAW = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "-0.0", "01", "+1"),
    *('"\\ud800"', '"\\udfff x"', '"\\u0000"', '"\\u202e"', "1" + "0" * 400),
    *("9" * 5000, "[" * 200 + "]" * 200, "[" * 20_000 + "]" * 20_000),
    *('{"a":' * 900 + "1" + "}" * 900, '{"kind":1,"kind":2}', "nul", ""),
)
_NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 64, 255, 256, 1000, 4097, 60_000, 65_535, 65_536, 65_537),
    *(2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30),
    *(0.5, -0.5, 1.0, 1e-320, 1e-30, 1e30, 1.7e308, -1e308, 3.7),
)
_TEXTS = (
    *("", " ", "\0", "a\0b", "a\nb", "\x1b[31m", "x" * 20_000, "é" * 500, "色" * 99),
    *("../../outside/x", "/etc/passwd", "~nobody/x", "%s%n", "{}", "None", "true"),
    *("float32", "float64", "int8", "complex64", "F32", "Q9", "os.system", "Policy"),
    *("StreamSetup", "Recache", "Absolute", "UniPC", "tiny", "1", "-1", "1e5", "[5s]"),
    *("a[99999999999s]", "a | | b", "[", "]]", "a[0f]", "#", "b[5s#] | #[#]"),
)
_PLAIN = (None, True, False, [], {}, [[]], [0] * 1000, {"kind": 3}, [None], {"": 0})
_BOXES = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"udta", b"edts", b"dinf")
_PICKLE = (
    b"().}]NR2utsbK\x01\x8a\x04\xff\xff\xff\x7f0q\x00h\x00\x85\x86\x87\x93\x81c\x94"
)


def change_bytes(rng: random.Random, data: bytes, most: int = 4) -> bytes:
    """Returns bytes with some flipped, removed, inserted, repeated or made extreme."""
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 2, 4, 8, 64, 1024)))
        data = rng.choice(_BYTE_CHANGES)(rng, data, at, end)
    return data


def _flip(rng, data, at, end):
    if at == len(data):
        return data
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _extreme(rng, data, at, end):
    """A length or an offset, of 2, 4 or 8 bytes, in either order."""
    order, size = rng.choice("<>"), rng.choice((2, 4, 8))
    kind = {2: "H", 4: "I", 8: "Q"}[size]
    top = 2 ** (8 * size)
    values = (0, 1, 2, 8, 255, 65_535, top - 1, top // 2, top // 2 - 1, len(data))
    value = struct.pack(order + kind, min(rng.choice(values), top - 1))
    return data[:at] + value + data[at + size :]


def _noise(rng, data, at, end):
    return data[:at] + rng.randbytes(rng.choice((1, 3, 16, 300))) + data[end:]


_BYTE_CHANGES: tuple[Callable, ...] = (
    *(_flip, _flip, _extreme, _noise),
    lambda rng, data, at, end: data[:at],
    lambda rng, data, at, end: data[:at] + data[end:],
    lambda rng, data, at, end: data[:end] + data[at:],
    lambda rng, data, at, end: data[:at] + b"\0" * (end - at) + data[end:],
)


def change_json(rng: random.Random, value: Any, most: int = 3) -> str:
    """Returns the text of a JSON document some of whose values are hostile."""
    holder, raw = {"": copy.deepcopy(value)}, []
    for _ in range(rng.randint(1, most)):
        places = list(_places(holder))
        if not places:
            break
        box, key = rng.choice(places)
        # Values that an earlier change removed are skipped.
        with contextlib.suppress(LookupError, TypeError):
            rng.choice(_VALUE_CHANGES)(rng, box, key, raw, places)
    text = json.dumps(holder[""] if "" in holder else None)
    for number, token in enumerate(raw):
        text = text.replace(f'"{_MARK}{number}"', token)
    return text


def _places(box):
    """Yields every (container, key) of a document."""
    for key in list(box) if isinstance(box, dict) else range(len(box)):
        yield box, key
        if isinstance(box[key], dict | list):
            yield from _places(box[key])


def _replace(rng, box, key, raw, places):
    box[key] = copy.deepcopy(rng.choice(rng.choice((_NUMBERS, _TEXTS, _PLAIN))))


def _replace_raw(rng, box, key, raw, places):
    raw.append(rng.choice(_RAW))
    box[key] = f"{_MARK}{len(raw) - 1}"


def _tweak(rng, box, key, raw, places):
    """Returns a changed number, a longer text, or another list."""
    value = box[key]
    if isinstance(value, bool | None):
        box[key] = int(bool(value))
    elif isinstance(value, int | float):
        change = rng.choice((-1, 1, value, -2 * value, 999 * value, 0.5))
        box[key] = value + change
    elif isinstance(value, str):
        box[key] = rng.choice((value * 2, value[:-1], value.upper(), value + "\0"))
    elif isinstance(value, list):
        box[key] = rng.choice((value * 2, value[:-1], value[::-1], value * 2000))


def _retype(rng, box, key, raw, places):
    value = box[key]
    box[key] = rng.choice((str(value)[:100], [value], {"kind": value}, value == 1))


def _delete(rng, box, key, raw, places):
    del box[key]


def _rename(rng, box, key, raw, places):
    if isinstance(box, dict):
        box[rng.choice((f"{key}x", "kind", *_TEXTS))] = box.pop(key)


def _twice(rng, box, key, raw, places):
    if isinstance(box, dict):
        raw.append(f"0,{json.dumps(key)}:{json.dumps(box[key])}")
        box[key] = f"{_MARK}{len(raw) - 1}"


def _borrow(rng, box, key, raw, places):
    other, name = rng.choice(places)
    box[key] = copy.deepcopy(other[name])


_VALUE_CHANGES = (
    *(_replace, _replace, _replace, _replace_raw, _tweak, _tweak, _tweak, _retype),
    *(_delete, _rename, _twice, _borrow),
)


def change_text(rng: random.Random, data: bytes) -> bytes:
    """Returns lines of text, or of JSON or commas, with some of them changed."""
    lines = data.split(b"\n")
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(lines))
        lines[at] = _changed_line(rng, lines[at])
        if rng.random() < 0.2:
            lines.insert(at, lines[rng.randrange(len(lines))])
    data = rng.choice((b"\n", b"\n", b"\r\n", b"\r")).join(lines)
    return change_bytes(rng, data) if rng.random() < 0.3 else data


def _changed_line(rng, line: bytes) -> bytes:
    if line.lstrip().startswith((b"{", b"[")) and rng.random() < 0.8:
        with contextlib.suppress(ValueError, RecursionError):
            changed = change_json(rng, json.loads(line))
            return changed.encode("utf-8", "surrogatepass")
    words = line.split(b" ")
    word = rng.choice(_TEXTS).encode()
    words[rng.randrange(len(words))] = word if len(word) < 1000 else word * 30
    return b" ".join(words)


def change_safetensors(
    rng: random.Random, data: bytes, entries: Sequence[str] = ()
) -> bytes:
    """Returns a safetensors file with another header, length or content.

    Args:
      rng: random generator of the changes.
      data: a whole file.
      entries: names in its metadata whose values are JSON documents.
    """
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    way = rng.random()
    if way < 0.5 and entries:
        stored = header["__metadata__"]
        name = rng.choice(entries)
        stored[name] = change_json(rng, json.loads(stored[name]))
        # Some files get no checksum, like older files.
        if rng.random() < 0.8:
            stored.pop("sha256", None)
        text = json.dumps(header)
    elif way < 0.8:
        text = change_json(rng, header)
    else:
        return change_bytes(rng, data[: 8 + length]) + change_bytes(rng, rest)
    # Files whose header cannot be written as UTF-8 are also useful inputs.
    head = text.encode("utf-8", "surrogatepass")
    said = (
        len(head) if rng.random() < 0.9 else rng.choice((0, 1, 2**32, 2**63, 2**64 - 1))
    )
    return struct.pack("<Q", said) + head + rest


def change_pickle(rng: random.Random, data: bytes) -> bytes:
    """Returns a pickle with opcodes removed, repeated, moved or inserted."""
    try:
        starts = [at for _, _, at in pickletools.genops(data)] + [len(data)]
    except (ValueError, IndexError):
        return change_bytes(rng, data)
    pieces = [data[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    for _ in range(rng.randint(1, 5)):
        at, other = rng.randrange(len(pieces)), rng.randrange(len(pieces))
        way = rng.randrange(5)
        if way == 0 and len(pieces) > 2:
            del pieces[at]
        elif way == 1:
            pieces[at : at + 1] = [pieces[at]] * rng.choice((2, 3, 100, 5000))
        elif way == 2:
            pieces[at], pieces[other] = pieces[other], pieces[at]
        elif way == 3:
            first = rng.randrange(len(_PICKLE))
            pieces.insert(at, _PICKLE[first : first + rng.randint(1, 6)])
        else:
            pieces[at] = change_bytes(rng, pieces[at], 1)
    return b"".join(pieces)


def change_zip(
    rng: random.Random, data: bytes, change: Callable, suffix: str = "data.pkl"
) -> bytes:
    """Returns an archive with a changed member or changed tables.

    Args:
      rng: random generator of the changes.
      data: the archive.
      change: changes the member whose name ends in `suffix`.
      suffix: end of that name.
    """
    if rng.random() < 0.25:
        return change_bytes(rng, data)
    out = io.BytesIO()
    kind = rng.choice((zipfile.ZIP_STORED,) * 9 + (zipfile.ZIP_DEFLATED,))
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content, name = old.read(info), info.filename
            if name.endswith(suffix):
                content = change(rng, content)
            elif rng.random() < 0.05:
                content = change_bytes(rng, content)
            if rng.random() < 0.02:
                name = rng.choice(("../outside/x", "/etc/x", name + "x", name[:-1]))
            new.writestr(zipfile.ZipInfo(name), content, kind)
    return (
        change_bytes(rng, out.getvalue(), 1) if rng.random() < 0.1 else out.getvalue()
    )


def change_boxes(rng: random.Random, data: bytes) -> bytes:
    """Returns an MP4 file with boxes of other sizes, names, contents and places."""
    for _ in range(rng.randint(1, 3)):
        boxes = list(_boxes(data, 0, len(data)))
        if not boxes:
            break
        at, end = rng.choice(boxes)
        way = rng.randrange(6)
        if way == 0:
            size = rng.choice((0, 1, 7, 8, 9, end - at + 8, 2**31, 2**32 - 1))
            data = data[:at] + struct.pack(">I", size) + data[at + 4 :]
        elif way == 1:
            name = rng.choice(
                (*_BOXES, b"free", b"mdat", b"stsd", b"meta", b"\xff\0\0\1")
            )
            data = data[: at + 4] + name + data[at + 8 :]
        elif way == 2:
            data = data[:at] + data[end:]
        elif way == 3:
            data = data[:end] + data[at:end] * rng.choice((1, 2, 50)) + data[end:]
        else:
            inner = change_bytes(rng, data[at + 8 : end])
            head = struct.pack(">I", len(inner) + 8) if way == 4 else data[at : at + 4]
            data = data[:at] + head + data[at + 4 : at + 8] + inner + data[end:]
    return data


def _boxes(data: bytes, at: int, end: int):
    """Yields the start and end of every box, nested boxes included."""
    while at + 8 <= end:
        (size,) = struct.unpack(">I", data[at : at + 4])
        stop = at + size
        if size < 8 or stop > end:
            return
        yield at, stop
        if data[at + 4 : at + 8] in _BOXES:
            yield from _boxes(data, at + 8, stop)
        at = stop
