import gzip
import hashlib

import pytest

from sparsetrain.data.files import fetch, read_exactly, whole_or_nothing


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def test_a_fetched_file_is_whole_and_alone_in_its_folder(tmp_path):
    source, target = tmp_path / "source", tmp_path / "new" / "deep" / "target"
    source.write_bytes(b"contents")
    fetch(source.as_uri(), target, md5(b"contents"))
    assert target.read_bytes() == b"contents"
    assert list(target.parent.iterdir()) == [target]


def test_a_download_with_another_checksum_is_refused_and_leaves_nothing(tmp_path):
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(b"conte")
    with pytest.raises(ValueError, match=rf"its MD5 is {md5(b'conte')} \(5 bytes\).*put it at {target}"):
        fetch(source.as_uri(), target, md5(b"contents"))
    assert not list(target.parent.iterdir())


def test_without_a_connection_the_error_names_the_address_and_the_place(tmp_path):
    url, target = (tmp_path / "nowhere").as_uri(), tmp_path / "target"
    with pytest.raises(ConnectionError, match=rf"{url} could not be downloaded .*put it at {target}"):
        fetch(url, target, "")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file_as_it_was(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def interrupted() -> None:
        with whole_or_nothing(target) as file:
            file.write(b"ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_packed_and_plain_files_read_alike(tmp_path):
    (tmp_path / "plain").write_bytes(b"abcd")
    (tmp_path / "packed.gz").write_bytes(gzip.compress(b"abcd"))
    assert read_exactly(tmp_path / "plain", 4) == read_exactly(tmp_path / "packed.gz", 4) == b"abcd"


@pytest.mark.parametrize("content", [b"abc", b"abcde", b""])
def test_a_file_of_another_size_is_refused_with_both_sizes(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} holds {len(content)} bytes where 4 are expected\. Delete it"):
        read_exactly(path, 4)


@pytest.mark.parametrize(
    "content", [gzip.compress(b"abcd" * 100)[:-9], b"no gzip", b""], ids=["truncated", "not_packed", "empty"]
)
def test_a_broken_packed_file_is_refused(tmp_path, content):
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}.* Delete it"):
        read_exactly(path, 400)


def test_a_missing_file_names_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone is missing\. Call prepare_data\(\)"):
        read_exactly(tmp_path / "gone", 4)
