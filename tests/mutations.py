"""Hostile variants of good files: bytes, JSON, safetensors headers, Parquet, YAML, archives, and what lies in a folder.

Every function takes a `random.Random` first, so that whoever drives them (hypothesis) can repeat and shrink a case.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TRAVERSALS = ("../outside", "../../outside/file", "/etc/passwd", "data/../../x", "a\\..\\b", "~/x", "c:\\x", "a/./../b")
WORDS = (
    "",
    "\0",
    "a\0b",
    "\n",
    "nan",
    "e\u0301\u202e",
    "\ud800",
    "x" * 5000,
    "{{7*7}}",
    "<script>",
    "'; --",
    "=",
    "0x",
)
NUMBERS = (0, -1, 1, 2, 3, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400)
FLOATS = (0.0, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), 0.5, -1.5)


class Payload:
    """Unpickled, it makes a file: what must never happen."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (self._marker,)


def hostile(random: Random) -> Any:
    """A plausible hostile JSON value."""
    kind = random.randrange(8)
    if kind == 0:
        return random.choice((None, True, False))
    if kind == 1:
        return random.choice(NUMBERS)
    if kind == 2:
        return random.choice(FLOATS)
    if kind == 3:
        return random.choice(TRAVERSALS)
    if kind == 4:
        return random.choice(WORDS)
    if kind == 5:
        return random.choice(([], {}, [[]], [{}], {"": None}, [1, "a", None], {"class": "VAE"}, [0] * 3000))
    if kind == 6:
        return _nested(random.choice((3, 30, 300)))
    return [hostile(random) for _ in range(random.randrange(4))]


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value] if depth % 2 else {"a": value}
    return value


def mutate_tree(random: Random, tree: Any) -> Any:
    """A tree with a node replaced, dropped, added, renamed, doubled, or two exchanged."""
    spots = list(_spots(tree))
    if not spots or random.random() < 0.03:
        return hostile(random)
    holder, key = random.choice(spots)
    kind = random.randrange(7)
    if kind <= 1:
        holder[key] = hostile(random)
    elif kind == 2:
        holder[key] = _nudged(random, holder[key])
    elif kind == 3:
        del holder[key]
    elif kind == 4 and isinstance(holder, dict):
        holder[random.choice(("", "../x", f"{key}_", "__class__", "__array__", "a.b"))] = hostile(random)
    elif kind == 5 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    elif isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        other, name = random.choice(spots)
        holder[key], other[name] = other.get(name) if isinstance(other, dict) else other[name], holder[key]
    return tree


def _nudged(random: Random, value: Any) -> Any:
    """Nearly the same value: another type, one more, the other sign."""
    if isinstance(value, bool):
        return random.choice((not value, int(value), str(value).lower()))
    if isinstance(value, int | float):
        return random.choice((value + 1, -value, value * 1000, str(value), float(value) + 0.5, [value]))
    if isinstance(value, str):
        return random.choice(
            (value + "/..", value.upper(), value[:-1], value + "\0", "../" + value, [value], value * 9)
        )
    if isinstance(value, list):
        return random.choice(
            (value * 3, value[:-1], value[::-1], {str(i): v for i, v in enumerate(value[:9])}, tuple(value))
        )
    return [value]


def _spots(tree: Any) -> Any:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items)[:60]:
        yield tree, key
        yield from _spots(value)


def mutate_bytes(random: Random, content: bytes) -> bytes:
    """Bytes with bits flipped, parts overwritten, cut off, inserted, taken out or doubled."""
    size = len(content)
    at, length = random.randrange(size + 1), random.choice((1, 2, 4, 8, 60, 1000))
    run = bytes([random.randrange(256)]) * length
    kind = random.randrange(9)
    if kind <= 2 and size:
        at = random.randrange(size)
        return content[:at] + bytes([content[at] ^ (1 << random.randrange(8))]) + content[at + 1 :]
    if kind == 3:
        return content[:at] + run + content[at + length :]
    if kind == 4:
        return content[:at]
    if kind == 5:
        return content[:at] + run + content[at:]
    if kind == 6:
        return content[:at] + content[at + length :]
    if kind == 7:
        return content[:at] + content[at : at + length] * 3 + content[at + length :]
    return random.choice((b"", b"\x80\x04.", b"\xff\xfe{\x00}\x00", b"null", b"[" * 100_000, b'{"a":' * 50_000, run))


def mutate_json(random: Random, content: bytes) -> bytes:
    """A JSON file changed in its tree, or in its bytes."""
    kind = random.randrange(10)
    if kind == 0:
        return mutate_bytes(random, content)
    if kind == 1:  # the same key twice
        return content.replace(b"{", b'{"%s": 3, ' % random.choice((b"class", b"game", b"frames", b"mean", b"mode")), 1)
    if kind == 2:
        return random.choice(
            (b"\xef\xbb\xbf" + content, content.decode().encode("utf-16"), content + b"{}", b"\0" + content)
        )
    return _dumped(mutate_tree(random, json.loads(content)))


def _dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def mutate_lines(random: Random, content: bytes) -> bytes:
    """A file of JSON lines with one of them changed, doubled or dropped."""
    lines = content.split(b"\n")
    at = random.randrange(len(lines))
    if not lines[at].strip() or random.random() < 0.1:
        return mutate_bytes(random, content)
    lines[at] = random.choice((mutate_json(random, lines[at]), lines[at] + b"\n" + lines[at], b""))
    return b"\n".join(lines)


def mutate_safetensors(random: Random, content: bytes) -> bytes:
    """A safetensors file with another header over the same bytes."""
    if random.random() < 0.2:
        return mutate_bytes(random, content)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    names = sorted(set(header) - {"__metadata__"})
    entry = header[random.choice(names)]
    kind = random.randrange(10)
    if kind == 0:
        entry["shape"] = random.choice(([2**62, 4], [2**31] * 3, [-1], [], [0], [1] * 200, [2**64], [1.5], "4", None))
    elif kind == 1:
        entry["dtype"] = random.choice(("F64", "I8", "BOOL", "F8_E5M2", "BF16", "U64", "O", "", 3, None, "F4", "C64"))
    elif kind == 2:
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = random.choice(
            (
                [-1, end],
                [begin, 2**63],
                [end, begin],
                [begin, begin],
                [0, end],
                [begin + 1, end + 1],
                [begin],
                None,
                [0, len(data)],
            )
        )
    elif kind == 3:
        header["__metadata__"] = random.choice((None, 3, {"a": 1}, {"format": "pt"}, {"x" * 1000: "y"}, [], "pickle"))
    elif kind == 4:
        header[random.choice(("../x", "", "head.layers.0.weight", "\0", "x" * 3000))] = entry
    elif kind == 5:
        del header[random.choice(names)]
    elif kind == 6:
        one, other = random.choice(names), random.choice(names)
        header[one], header[other] = header[other], header[one]
    elif kind == 7:
        data = random.choice(
            (data[:-1], data + b"\0", data * 2, b"", b"\xff" * len(data), b"\0\0\xc0\x7f" * (len(data) // 4))
        )
    else:
        header = mutate_tree(random, header)
    encoded = _dumped(header)
    declared = (
        len(encoded) if random.random() < 0.9 else random.choice((0, 1, 2**63, 2**64 - 1, 10**8 + 1, len(encoded) - 1))
    )
    return struct.pack("<Q", declared) + encoded + data


def mutate_parquet(random: Random, content: bytes, marker: Path) -> bytes:
    """A Parquet file with other bytes, mostly in its footer, or written anew with other columns."""
    kind = random.randrange(5)
    if kind <= 1:
        length = int.from_bytes(content[-8:-4], "little")
        start = len(content) - 8 - length
        return content[:start] + mutate_bytes(random, content[start:])
    if kind == 2:
        return mutate_bytes(random, content)
    table = pq.read_table(pa.BufferReader(content))
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(_other_table(random, table, marker), sink)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return content[: len(content) // 2]
    return bytes(sink.getvalue().to_pybytes())


def pickled_column(rows: int, marker: Path) -> pa.Array:
    """A column of Ray's extension type for Python objects: who asks it for values unpickles."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    storage = pa.array([pickle.dumps(Payload(marker))] * rows, pa.large_binary())
    return pa.ExtensionArray.from_storage(ArrowPythonObjectType(), storage)


def _other_table(random: Random, table: pa.Table, marker: Path) -> pa.Table:
    at = random.randrange(table.num_columns)
    name, column, rows = table.column_names[at], table.column(at), table.num_rows
    kind = random.randrange(9)
    if kind == 0:
        return table.set_column(at, name, pickled_column(rows, marker))
    if kind == 1:
        return table.set_column(at, table.schema.field(at).with_nullable(True), pa.nulls(rows, column.type))
    if kind == 2:
        return table.set_column(at, name, pa.array([random.choice(TRAVERSALS)] * rows))
    if kind == 3:
        return table.set_column(at, name, pa.array([random.choice((-1, 0, 2**62, -(2**63), 10**6))] * rows, pa.int64()))
    if kind == 4:
        return table.drop_columns([name])
    if kind == 5:
        return table.slice(random.randrange(rows + 1))
    if kind == 6:
        return pa.concat_tables([table] * random.randrange(4) or [table.slice(0, 0)])
    if kind == 7:
        held = {**(table.schema.metadata or {}), b"latentrl.shape": b"[1e9]", b"pandas": pickle.dumps(Payload(marker))}
        return table.replace_schema_metadata(held)
    return table.set_column(at, name, column.dictionary_encode() if name == "file" else pa.array([[1, 2]] * rows))


YAMLS = (
    "!!python/object/apply:os.mkdir [{marker}]",
    "!!python/object/new:os.mkdir {{args: [{marker}]}}",
    "train: !!python/name:os.system ",
    "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nd: &d [*c, *c, *c]\ntrain: {{lr: *d}}",
    "a: &a {{x: 1, y: 1}}\nb: &b {{x: *a, y: *a}}\nc: &c {{x: *b, y: *b}}\nd: &d {{x: *c, y: *c}}",
    "train: &a {{lr: *a}}",
    "&a [*a]",
    "train: {{lr: 2001-99-99}}",
    "train: {{lr: 190:20:30.15}}",
    "train: {{lr: 0x_}}",
    "train: {{lr: =}}",
    "train: {{<<: [3]}}",
    "train: {{<<: {{lr: 1}}}}",
    "? [a, b]\n: 1",
    "? {{a: b}}\n: 1",
    "train: {{lr: !!int x}}",
    "train: {{lr: !!float x}}",
    "train: {{lr: !!binary '*'}}",
    "train: {{lr: !!timestamp x}}",
    "train: {{lr: !!set {{a, b}}}}",
    "train: {{lr: !<tag:yaml.org,2002:python/object:x> 3}}",
    "--- 1\n--- 2",
    "%YAML 9.9\n---\na: 1",
    "train:\n\tlr: 1",
    "{{}}",
    "",
    "null: {{null: null}}",
    "1: {{2.5: true}}",
    "model: {{z_dim: 100000000000}}",
    "model: {{widths: [1000000000, 1]}}",
    "model: {{num_blocks: 1000000000}}",
    "q: {{hidden: [1000000000000]}}",
    "train: {{replay_capacity: 1e300}}",
    "train: {{batch_size: 99999999999999999999}}",
)


def yaml_text(random: Random, good: str, marker: Path) -> bytes:
    """A YAML document that means harm, or a good one changed."""
    import yaml

    kind = random.randrange(6)
    if kind <= 1:
        return random.choice(YAMLS).format(marker=marker).encode()
    if kind == 2:
        return random.choice(("[" * 400, "{a: " * 400, "- " * 400, "a: " + "[" * 300 + "]" * 300)).encode()
    if kind == 3:
        return mutate_bytes(random, good.encode())
    tree = mutate_tree(random, yaml.safe_load(good))
    return yaml.safe_dump(json.loads(json.dumps(tree, allow_nan=True)), sort_keys=False).encode(
        "utf-8", "surrogateescape"
    )


def mutate_zip(random: Random, content: bytes, scratch: Path) -> bytes:
    """A zip archive with other names, other ways of packing, or other bytes."""
    if random.random() < 0.4:
        return mutate_bytes(random, content)
    source, target = scratch / "in.zip", scratch / "out.zip"
    source.write_bytes(content)
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if random.random() < 0.3:
                info.filename = random.choice((*TRAVERSALS, "", "x/", "SHA256SUMS/x", "config.json/x", "x" * 300, "."))
            if random.random() < 0.2:
                info.compress_type = random.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2))
                data = random.choice((data, b"\0" * (1 << 22)))
            if random.random() < 0.1:
                info.external_attr = 0o120777 << 16  # a symbolic link
                data = b"/etc/passwd"
            new.writestr(info, data)
    return target.read_bytes()


def mutate_folder(random: Random, folder: Path, outside: Path, names: list[str]) -> None:
    """A folder in which one file is something else: a link, a pipe, a folder, gone, empty, or not alone."""
    path = folder / random.choice(names)
    kind = random.randrange(9)
    if kind == 0:
        path.unlink()
        path.symlink_to(random.choice((outside, outside / "file", Path("/dev/zero"), Path("/proc/self/environ"), path)))
    elif kind == 1:
        path.unlink()
        os.mkfifo(path)
    elif kind == 2:
        path.unlink()
        path.mkdir()
    elif kind == 3:
        path.unlink()
    elif kind == 4:
        path.write_bytes(b"")
    elif kind == 5:
        path.write_bytes(pickle.dumps(Payload(outside / "marker")))
    elif kind == 6:
        (
            folder / random.choice(("x.pkl", "a b", "\n", "-rf", "é", "_dict_checkpoint.pkl", "algorithm_state.pkl"))
        ).write_bytes(pickle.dumps(Payload(outside / "marker")))
    elif kind == 7:
        (folder / "deep").joinpath(*["d"] * 60).mkdir(parents=True)
    else:
        (folder / "link").symlink_to(random.choice((outside, outside / "file", Path(".."), Path("link"))))
