"""The forms of tars that are indexed: names of members as webdataset reads them, what is left out, tars in a row."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from parallel.errors import UserError
from spar_scale.data.commands import index, show
from spar_scale.data.loader import Loader, Source
from spar_scale.data.spec import SampleSpec
from spar_scale.data.storage import read_member
from spar_scale.data.tar_index import index_shard, read_index
from spar_scale.training.tracking import RunLog, read_lines

LATIN = b"gr\xf6\xdfe".decode("utf-8", "surrogateescape")
END = 2 * 512  # zero bytes behind the last member


def member(name: str, data: bytes = b"", **given) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for attribute, value in given.items():
        setattr(info, attribute, value)
    return info, data


def tar_of(members: Iterable[str | tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT, **given) -> bytes:
    """A tar of these members; one that is only a name holds its name."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape", **given) as tar:
        for one in members:
            info, data = member(one, one.encode("utf-8", "surrogateescape")) if isinstance(one, str) else one
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def refusal(action, *given) -> str:
    with pytest.raises(UserError) as caught:
        action(*given)
    return str(caught.value)


def samples_of(shard: Path) -> list[tuple[str, dict[str, bytes]]]:
    index([str(shard)])
    found = read_index(str(shard))
    tables = [found.members(number) for number in range(len(found))]
    samples = [{name: read_member(str(shard), *place) for name, place in table.items()} for table in tables]
    return list(zip(found.keys, samples, strict=True))


def streamed(shard: Path) -> list[tuple[str, dict[str, bytes]]]:
    """What webdataset reads."""
    from webdataset.tariterators import tarfile_to_samples

    with open(shard, "rb") as stream:
        samples = list(tarfile_to_samples()([{"url": str(shard), "stream": stream}]))
    own = ("__key__", "__url__")
    return [(sample["__key__"], {k: v for k, v in sample.items() if k not in own}) for sample in samples]


LONG = "/".join(["a" * 40] * 6)
PREFIXED = f"{'d' * 150}/{'e' * 90}.txt"  # of the length that a ustar header has room for in two parts
NAMES = {
    "upper case": ["S1.PNG", "S1.TXT", "s1.Png", "s1.txt"],
    "dots in base names": ["a.b.png", "a.b.txt", "c..txt", "d.e.f.JSON"],
    "dots in folders": ["x.y/a.png", "x.y/a.txt", "x.y/z.w/a.png", "v.1/README"],
    "prefixes": ["./a.png", "./a.txt", "../b.txt", "/c.txt", "././d.txt"],
    "no name of an extension": ["a.", "b.txt", "README", "d/Makefile"],
    "metadata": ["__meta__", "__x__/a.txt", "__y__.txt", "__z__a.txt", "d/__w__/a.txt", "b.txt"],
    "hidden": [".a.txt", "./.b.txt", ".git/c.txt", "d.txt"],
    "spaces and signs": ["a b.png", "a b.txt", "c?d=e#%20.txt", "tab\there.txt", "line\nbreak.txt", "d/l\nb.txt"],
    "scripts": ["图像.png", "图像.TXT", "e\u0301.txt", "\u00e9.txt", "\U0001f600.txt"],
    "jpg and png of one key": ["a.jpg", "a.png", "a.txt"],
    "samples in parts": ["a.input.png", "a.output.png", "a.txt", "b.seg.PNG"],
    "long names": [f"{LONG}/a.png", f"{LONG}/a.txt", f"{'b' * 96}.txt", f"{'c' * 97}.txt", f"{'d' * 200}.txt"],
    "a long directory": [PREFIXED],
    "no UTF-8": [f"{LATIN}.png", f"{LATIN}.txt", f"d/{LATIN}.txt", f"f.{LATIN}"],
}
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", NAMES)
def test_names_are_read_as_webdataset_reads_them(tmp_path, case, form):
    shard, names = tmp_path / "x.tar", NAMES[case]
    if form == "ustar":  # which has no room for longer names
        names = [name for name in names if len(name) <= 100 or name == PREFIXED]
    folder = member("d.x", type=tarfile.DIRTYPE)
    shard.write_bytes(tar_of([folder, *names], FORMATS[form], pax_headers={"comment": "of the whole tar"}))
    assert names
    found = samples_of(shard)
    assert found == streamed(shard) and found


PAX = {
    "fraction of a second": {"mtime": "1700000000.123456789"},
    "an owner of another script": {"uname": "Ελένη", "gname": "图"},
    "the path": {"path": "other/b.TXT"},
    "bytes of another encoding": {"hdrcharset": "BINARY", "path": "d/" + LATIN + ".txt"},
    "attributes": {"SCHILY.xattr.user.x": "y", "LIBARCHIVE.creationtime": "1"},
}


@pytest.mark.parametrize("case", PAX)
def test_extended_headers_are_read_as_webdataset_reads_them(tmp_path, case):
    shard = tmp_path / "x.tar"
    shard.write_bytes(tar_of([member("a.png", b"1"), member("b.txt", b"2", pax_headers=PAX[case])], tarfile.PAX_FORMAT))
    assert samples_of(shard) == streamed(shard)


def test_hidden_files_in_folders_are_no_samples(tmp_path, capsys):
    """webdataset makes one sample "d/" of them, and ends the sample that they stand in."""
    shard = tmp_path / "x.tar"
    shard.write_bytes(tar_of(["d/a.png", "d/._a.png", "d/a.txt", "d/._a.txt", "d/.DS_Store"]))
    assert samples_of(shard) == [("d/a", {"png": b"d/a.png", "txt": b"d/a.txt"})]
    assert "left out, hidden files: 3 (d/._a.png, d/._a.txt, d/.DS_Store)" in capsys.readouterr().out


@pytest.mark.parametrize("names", [("A.JPG", "A.jpg"), ("a.Input.png", "a.txt", "a.INPUT.PNG")])
def test_two_members_of_one_extension_are_refused_and_both_named(tmp_path, names):
    shard = tmp_path / "x.tar"
    shard.write_bytes(tar_of(names))
    error = refusal(index, [str(shard)])
    assert error.startswith(f"{shard}: members '{names[0]}' and '{names[-1]}' have the same extension ")


LEFT_OUT = {
    "hard link": (member("a.png", type=tarfile.LNKTYPE, linkname="s.txt"), "links: 1 (a.png)"),
    "symbolic link": (member("a.png", type=tarfile.SYMTYPE, linkname="s.txt"), "links: 1 (a.png)"),
    "FIFO": (member("a.png", type=tarfile.FIFOTYPE), "devices, FIFOs and unknown types: 1 (a.png)"),
    "device": (member("a.png", type=tarfile.CHRTYPE), "devices, FIFOs and unknown types: 1 (a.png)"),
    "unknown type": (member("a.png", b"1" * 600, type=b"Z"), "devices, FIFOs and unknown types: 1 (a.png)"),
    "no extension": (member("d/README"), "no extension: 1 (d/README)"),
    "hidden": (member(".a.png"), "hidden files: 1 (.a.png)"),
    "metadata": (member("__x__/a.png"), "webdataset's metadata: 1 (__x__/a.png)"),
    "NUL": (member("b.txt", pax_headers={"path": "b\0c.txt"}), r"a NUL in the name: 1 (b\x00c.txt)"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_is_counted_and_named(tmp_path, capsys, case):
    left_out, line = LEFT_OUT[case]
    shard = tmp_path / "x.tar"
    shard.write_bytes(tar_of(["s.txt", left_out, "t.txt"], tarfile.PAX_FORMAT))
    assert samples_of(shard) == [("s", {"txt": b"s.txt"}), ("t", {"txt": b"t.txt"})]
    printed = f"{shard}.index.npz: 2 samples with txt\n  left out, {line}\n"
    assert capsys.readouterr().out == printed
    shard.write_bytes(tar_of([left_out], tarfile.PAX_FORMAT))
    assert refusal(index, [str(shard)]).endswith(f"named KEY.EXTENSION\n  left out, {line}")


def test_a_sparse_member_is_left_out_and_the_members_behind_it_are_found(tmp_path, capsys):
    """Its header gives the size with the holes, of which the tar has nothing."""
    header = bytearray(tar_of([member("a.png", bytes(512), type=tarfile.GNUTYPE_SPARSE)])[:512])
    header[386:410] = b"%011o\0%011o\0" % (4096, 512)  # where its one piece belongs, and how long it is
    header[483:495] = b"%011o\0" % 8192  # size of the file
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    shard = tmp_path / "x.tar"
    shard.write_bytes(bytes(header) + bytes(512) + tar_of(["s.txt"]))
    assert samples_of(shard) == [("s", {"txt": b"s.txt"})]
    assert "left out, sparse files: 1 (a.png)" in capsys.readouterr().out


def test_extensions_that_no_task_reads_are_counted(tmp_path, capsys):
    names = ["a.png", "a.gif", "b.GIF", "b.cls", "b.input.webp", "c.input.tif", "c."]
    shard = tmp_path / "x.tar"
    shard.write_bytes(tar_of(names))
    index([str(shard)])
    assert (
        "  no task reads: gif (2), cls (1), input.tif (1), (no extension) (1); pictures are" in capsys.readouterr().out
    )


def test_tars_one_behind_the_other_are_one_shard(tmp_path):
    first, second, third = tar_of(["a.png", "a.txt", "b.txt"]), tar_of(["c.txt"]), tar_of(["d.TXT", "d.png"])
    shard = tmp_path / "x.tar"
    shard.write_bytes(first + second + tar_of([]) + third + bytes(700))
    found = samples_of(shard)
    assert [key for key, _ in found] == ["a", "b", "c", "d"]
    assert found[3] == ("d", {"txt": b"d.TXT", "png": b"d.png"})


def cut(tar: bytes) -> bytes:
    """A tar without the zeros behind its last member."""
    return tar.rstrip(b"\0") + bytes(-len(tar.rstrip(b"\0")) % 512)


ONE, MORE = cut(tar_of(["a.txt"])), tar_of(["b.txt", "c.txt"])
BEHIND = {
    "text": (ONE + bytes(END) + b"hello", f"found bytes that are not a tar at byte 2048 of {2048 + 5}, after"),
    "text far behind": (ONE + bytes(3 << 20) + b"x", f"found bytes that are not a tar at byte {1024 + (3 << 20)} of"),
    "text in a block": (
        ONE + bytes(END + 100) + b"x" + bytes(999),
        "found bytes that are not a tar at byte 2148 of 3148",
    ),
    "a compressed tar": (ONE + bytes(END) + b"\x1f\x8b" + bytes(100), "found bytes that are not a tar at byte 2048 of"),
    "a tar that is cut": (ONE + bytes(END) + MORE[:1536], "is truncated or damaged"),
    "a tar with a damaged header": (
        ONE + bytes(END) + MORE[:1100] + b"\xff" + MORE[1101:],
        f"is truncated or damaged at byte {2048 + 1024} of",
    ),
    "a key again": (ONE + bytes(END) + MORE + tar_of(["a.png"]), "key 'a' reappears after another key"),
    "one zero block at the end": (ONE + bytes(512), "a complete tar ends with two zero blocks"),
    "no zero block at the end": (ONE, "a complete tar ends with two zero blocks"),
    "one zero block between tars": (ONE + bytes(512) + MORE, "is truncated or damaged at byte 1024 of"),
}


@pytest.mark.parametrize("case", BEHIND)
def test_bytes_behind_the_end_that_are_no_tar_are_refused_with_their_place(tmp_path, case):
    content, message = BEHIND[case]
    shard = tmp_path / "x.tar"
    shard.write_bytes(content)
    error = refusal(index, [str(shard)])
    assert error.startswith(f"{shard}: ") and message in error


HEADERS = {
    "negative size": (124, b"\xff" * 12),
    "size beyond all files": (124, b"\x80" + b"\xff" * 11),
    "size that is no number": (124, b"12x45678901\0"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_with_an_impossible_number_is_refused(tmp_path, case):
    place, value = HEADERS[case]
    header = bytearray(MORE[:512])
    header[place : place + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    shard = tmp_path / "x.tar"
    shard.write_bytes(ONE + bytes(header) + MORE[512:])
    assert "is truncated or damaged" in refusal(index, [str(shard)])


def test_a_name_that_is_no_utf8_is_kept_and_can_be_printed_and_logged(tmp_path, capsys):
    shard, run_dir = tmp_path / f"{LATIN}.tar", tmp_path / "run"
    shard.write_bytes(tar_of([f"{LATIN}.png", f"{LATIN}.txt", f"{LATIN}.{LATIN}"]))
    (found,) = [key for key, _ in samples_of(shard)]
    assert found == LATIN
    show([str(shard)], 1, None)
    assert r"  gr\udcf6\udcdfe: gr" in capsys.readouterr().out
    loader = Loader([Source("images", str(shard))], SampleSpec("images", 8), 0, 1, 1, 1, 0, 1, 0, 0, 1)
    (batch,) = loader
    run_dir.mkdir()
    log = RunLog(run_dir, 0)
    log.bad_samples(1, batch["errors"])
    log.close()
    assert [line["key"] for line in read_lines(run_dir / "bad_samples.jsonl")] == [LATIN]
    assert json.dumps(batch["errors"]).isascii() and np.all(batch["weight"].numpy() == 0)


def test_names_that_are_no_utf8_can_be_read_in_refusals(tmp_path):
    shard = tmp_path / "x.tar"
    shard.write_bytes(tar_of([f"{LATIN}.txt", "b.txt", f"{LATIN}.png"]))
    error = refusal(index_shard, str(shard))
    assert r"key 'gr\udcf6\udcdfe' reappears" in error and error.isascii()
