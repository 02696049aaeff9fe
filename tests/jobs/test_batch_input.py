"""Input files and their lines: what is found, what is refused, and by which words."""

import gzip
import io
import os
import sys

import pytest

from ember_pp.errors import BatchInputError, ConfigError, InvalidRequestError
from ember_pp.jobs.batch_input import BatchInput, decode_line, find_files
from ember_pp.jobs.batch_requests import Requests, Shard

LINES = b'{"prompt": "a"}\n{"prompt": "b"}\n'


def open_input(*names, max_line_bytes=1000):
    return BatchInput(find_files([str(name) for name in names]), max_line_bytes=max_line_bytes)


def read(source):
    return [(line.number, line.raw) for line in source.lines()]


def write(path, content):
    path.write_bytes(content)
    return path


# --------------------------------------------------------------------------------------
# files


def test_a_list_keeps_its_order_and_a_glob_is_sorted(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write(tmp_path / name, LINES)
    globbed = find_files(str(tmp_path / "*.jsonl"))
    assert [file.path.name for file in globbed] == ["a.jsonl", "b.jsonl"]
    listed = find_files([str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")])
    assert [file.path.name for file in listed] == ["b.jsonl", "a.jsonl"]


def test_a_glob_leaves_out_what_the_job_writes(tmp_path):
    for name in ("in.jsonl", "out.jsonl"):
        write(tmp_path / name, LINES)
    files = find_files(str(tmp_path / "*.jsonl"), exclude=[tmp_path / "out.jsonl"])
    assert [file.path.name for file in files] == ["in.jsonl"]


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path):
    write(tmp_path / "x[1].jsonl", LINES)
    assert len(find_files(str(tmp_path / "x[1].jsonl"))) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{}/none*.jsonl", r"job.input: no file matches .*/none\*.jsonl"),
        ("{}/none.jsonl", r"job.input: .*/none.jsonl cannot be read: No such file"),
        ("{}", r"job.input: .* is a folder; give files or a glob"),
        (["{}/a.jsonl", "{}/a.jsonl"], r"job.input: .*/a.jsonl is named twice"),
        (["{}/a.jsonl", "{}/link.jsonl"], r"job.input: .*/link.jsonl is named twice"),
        ([], r"job.input: an empty list"),
        ([3], r"job.input: expected a file, .*; got 3"),
        ({"a": 1}, r"job.input: expected a file, .*; got \{'a': 1\}"),
    ],
)
def test_refuses_what_is_no_input(tmp_path, given, message):
    write(tmp_path / "a.jsonl", LINES)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    if isinstance(given, list):
        given = [item.format(tmp_path) if isinstance(item, str) else item for item in given]
    elif isinstance(given, str):
        given = given.format(tmp_path)
    with pytest.raises(ConfigError, match=message):
        find_files(given)


def test_stdin_is_read_once_and_served_twice(monkeypatch):
    class Stdin:
        buffer = io.BytesIO(LINES)

    monkeypatch.setattr(sys, "stdin", Stdin)
    source = open_input("-")
    assert read(source) == read(source) == [(1, b'{"prompt": "a"}'), (2, b'{"prompt": "b"}')]
    assert source.place(2) == "-:2"
    source.close()


def test_a_pipe_is_read_once_and_served_twice(tmp_path):
    reader, writer = os.pipe()
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(gzip.compress(LINES))
    source = open_input(f"/dev/fd/{reader}")
    os.close(reader)
    assert len(read(source)) == len(read(source)) == 2
    source.close()


def test_gzip_is_known_by_its_content(tmp_path):
    plain, packed = write(tmp_path / "a.gz", LINES), write(tmp_path / "b", gzip.compress(LINES))
    assert [raw for _, raw in read(open_input(plain))] == LINES.splitlines()
    assert [raw for _, raw in read(open_input(packed))] == LINES.splitlines()


@pytest.mark.parametrize("cut", [4, 12, 40])
def test_damaged_gzip_names_file_and_line(tmp_path, cut):
    content = os.urandom(3000).hex().encode() + b"\n" + LINES * 100
    path = write(tmp_path / "a.gz", gzip.compress(content)[:-cut])
    with pytest.raises(BatchInputError, match=r"a.gz: cannot be read past line \d+: "):
        read(open_input(path, max_line_bytes=10_000))


@pytest.mark.parametrize("change", [b"\n", b""], ids=["appended", "rewritten"])
def test_a_file_that_changes_between_the_passes_is_noticed(tmp_path, change):
    path = write(tmp_path / "a.jsonl", LINES)
    source = open_input(path)
    read(source)
    write(path, LINES + change)
    os.utime(path, ns=(1, 1))
    with pytest.raises(BatchInputError, match=r"a.jsonl: changed while the job was reading it"):
        read(source)


# --------------------------------------------------------------------------------------
# lines


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\n \n\t\r\n", []),
        (b"a\nb", [(1, b"a"), (2, b"b")]),
        (b"a\r\n\r\nb\r\n", [(1, b"a"), (3, b"b")]),
        (b"\xef\xbb\xbfa\n", [(1, b"a")]),
        (b"\xef\xbb\xbf", []),
        (b"\n\na\n", [(3, b"a")]),
    ],
)
def test_blank_lines_are_counted_and_left_out(tmp_path, content, expected):
    assert read(open_input(write(tmp_path / "a", content))) == expected


@pytest.mark.parametrize("length", [9, 10, 11, 12, 25])
def test_a_long_line_is_marked_and_the_next_one_is_whole(tmp_path, length):
    content = b"x" * length + b"\n" + b"next\n"
    lines = read(open_input(write(tmp_path / "a", content), max_line_bytes=10))
    # The bound is on the line with its line feed.
    assert lines == [(1, b"x" * length if length < 10 else None), (2, b"next")]


def test_numbers_run_on_over_files_and_places_do_not(tmp_path):
    names = [write(tmp_path / name, content) for name, content in
             (("a", b"1\n2\n"), ("b", b""), ("c", b"\n3"), ("d", b"4\n"))]  # fmt: skip
    source = open_input(*names)
    assert read(source) == [(1, b"1"), (2, b"2"), (4, b"3"), (5, b"4")]
    places = [source.place(number).rpartition("/")[2] for number in (1, 2, 4, 5)]
    assert places == ["a:1", "a:2", "c:2", "d:1"]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", r"not JSON: .* at column 2"),
        (b"\xff{}", "not UTF-8: byte 1 of the line"),
        (b'\xff\xfe{\x00"\x00', "not UTF-8"),
        (b'{"a": NaN}', "not JSON: NaN"),
        (b'{"a": -Infinity}', "not JSON: -Infinity"),
        (b'{"a": 1, "a": 2}', "key 'a' is there twice"),
        (b'{"x": {"a": 1, "b": 2, "a": 1}}', "key 'a' is there twice"),
        (b"[1]", "expected a JSON object, got list"),
        (b'"text"', "expected a JSON object, got str"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\udc00": 1}', "half of a surrogate pair"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not usable JSON: "),
        (b"{} {}", "not JSON: Extra data"),
    ],
)
def test_refuses_lines_that_are_no_json_object(raw, message):
    with pytest.raises(InvalidRequestError, match=message):
        decode_line(raw)


def test_accepts_what_json_allows():
    raw = '{"a": "\\ud83d\\ude00 \\u00e9 \u4e2d", "b": [1, 2.5, null, true], "c": {}}'.encode()
    assert decode_line(raw) == {"a": "\U0001f600 \u00e9 \u4e2d", "b": [1, 2.5, None, True], "c": {}}


# --------------------------------------------------------------------------------------
# requests


def requests_of(path, shard=None, answered=None):
    return Requests(open_input(path), answered or {}, Shard.parse(shard))


def test_every_bad_line_is_listed_by_place(tmp_path):
    content = b'{"prompt": "a", "custom_id": "x"}\n{"prompt"\n\n{"prompt": "b", "custom_id": "x"}\n'
    path = write(tmp_path / "in.jsonl", content + b'{"prompt": "c", "temprature": 1}\n')
    with pytest.raises(BatchInputError) as refusal:
        requests_of(path).check(skip_bad_lines=False)
    problems = refusal.value.problems
    assert [text.partition(": ")[0] for text in problems] == [f"{path}:{n}" for n in (2, 4, 5)]
    assert f"custom_id: 'x' is also at {path}:1" in problems[1]
    assert "temprature" in problems[2]
    assert "temperature" in problems[2]
    assert all(text in str(refusal.value) for text in problems)
    assert "cannot use 3 lines" in str(refusal.value)


def test_thousands_of_bad_lines_are_all_named_in_few_words(tmp_path):
    lines = [b"{" if 10 <= n < 3000 or n == 4000 else b'{"prompt": "a"}' for n in range(1, 5000)]
    path = write(tmp_path / "in.jsonl", b"\n".join(lines))
    with pytest.raises(BatchInputError, match="cannot use 2,991 lines") as refusal:
        requests_of(path).check(skip_bad_lines=False)
    assert len(refusal.value.problems) == 51
    assert refusal.value.problems[0].startswith(f"{path}:10: ")
    assert refusal.value.problems[-1] == f"and 2941 more: {path}:60-2999, {path}:4000"


def test_ids_are_made_from_line_numbers_and_may_clash(tmp_path):
    path = write(
        tmp_path / "in.jsonl", b'{"prompt": "a", "custom_id": "line-2"}\n{"prompt": "b"}\n'
    )
    with pytest.raises(BatchInputError, match=r"in.jsonl:2: custom_id: 'line-2' is also at"):
        requests_of(path).check(skip_bad_lines=False)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 30])
def test_shards_are_disjoint_and_complete(tmp_path, total):
    lines = [b"" if n % 5 == 0 else b'{"prompt": "a"}' for n in range(1, 24)]
    path = write(tmp_path / "in.jsonl", b"\n".join(lines))
    taken = []
    for index in range(1, total + 1):
        requests = requests_of(path, f"{index}/{total}")
        requests.check(skip_bad_lines=False)
        mine = [item.number for item in requests.pending()]
        assert len(mine) == requests.ledger.num_pending
        taken += mine
    assert sorted(taken) == [n for n in range(1, 24) if n % 5]


def test_shard_names_sort_in_order(tmp_path):
    names = [Shard.parse(f"{i}/16").name_file(tmp_path / "out.jsonl").name for i in range(1, 17)]
    assert names[2] == "out.03-of-16.jsonl"
    assert names == sorted(names)
    assert Shard.parse(None).name_file(tmp_path / "out.jsonl") == tmp_path / "out.jsonl"


def test_an_id_that_a_bad_line_has_taken_is_taken(tmp_path):
    content = (
        b'{"custom_id": "x", "prompt": "a", "frobnicate": 1}\n{"custom_id": "x", "prompt": "b"}\n'
    )
    path = write(tmp_path / "in.jsonl", content)
    with pytest.raises(BatchInputError) as refusal:
        requests_of(path).check(skip_bad_lines=False)
    assert f"custom_id: 'x' is also at {path}:1" in refusal.value.problems[1]
    requests = requests_of(path)
    requests.check(skip_bad_lines=True)
    assert [type(parsed).__name__ for parsed in requests.pending()] == ["BadLine", "BadLine"]
