"""The zip archive of a `torch.save` file, whose members are located, not unpacked."""

import dataclasses
import mmap
import reprlib
import struct
import zipfile
from typing import Any

CONVERT = (
    'python -c "import torch; torch.save(torch.load('
    "'IN', weights_only=True, map_location='cpu'), 'OUT')\""
)

ADVICE = (
    "nothing was run. Save only the tensors, where it was made:"
    " torch.save(model.state_dict(), 'OUT')"
)
_LEGACY = bytes.fromhex(
    "6cfc9c46f9206aa85019"
)  # the number at the start of older files
_LOCAL = struct.Struct("<4s5H3I2H")  # bytes of a member's own header
_FLAG_ENCRYPTED, _FLAG_SIZES_FOLLOW, _FLAG_UTF8 = 0x1, 0x8, 0x800


class Unreadable(Exception):
    """The fault of a file, without the file's name."""


@dataclasses.dataclass(frozen=True)
class Archive:
    """A zip archive on a memory map, whose members are located but never unpacked."""

    data: mmap.mmap
    members: dict[
        str, zipfile.ZipInfo
    ]  # members by name, without the common first folder
    folder: str
    end: int  # bytes of all members: the start of the archive's directory

    @classmethod
    def open(cls, file) -> "Archive":
        """Returns the archive in an open file.

        Raises:
          Unreadable: The file is not a complete archive of one saved object.
        """
        head = file.read(64)
        if _LEGACY in head:
            raise Unreadable(
                "in the format of PyTorch before 1.6, not a zip archive; convert"
                f" it where PyTorch is installed: {CONVERT}"
            )
        if not head.startswith(b"PK\x03\x04"):
            raise Unreadable(
                "not a zip archive as torch.save writes it; is it another kind of"
                " file, or the error page of a download?"
            )
        try:
            with zipfile.ZipFile(file) as listing:
                infos, end = listing.infolist(), listing.start_dir
        except (zipfile.BadZipFile, RuntimeError, ValueError) as error:
            raise Unreadable(
                f"not a complete zip archive ({error}); download or copy it again"
            ) from error
        folder, members = _names(infos)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(data, members, folder, end)

    def span(self, name: str) -> tuple[int, int]:
        """Returns the start and end of a member's bytes, from its own header.

        Raises:
          Unreadable: The member is missing, compressed, or outside the archive.
        """
        if name not in self.members:
            raise Unreadable(
                f"it has no member {show(name)} in its folder {show(self.folder)};"
                " the file must be a complete file of torch.save"
            )
        info = self.members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & _FLAG_ENCRYPTED:
            raise Unreadable(
                f"its member {show(name)} is compressed or encrypted, not plain"
                " bytes; use the file as torch.save wrote it"
            )
        header = info.header_offset
        if not 0 <= header <= self.end - _LOCAL.size:
            raise Unreadable(f"its member {show(name)} lies outside; download it again")
        return self._local_span(name, info)

    def _local_span(self, name: str, info: zipfile.ZipInfo) -> tuple[int, int]:
        fields = _LOCAL.unpack_from(self.data, info.header_offset)
        magic, _, flags, method, _, _, _, packed, size, name_size, extra = fields
        begin = info.header_offset + _LOCAL.size
        start = begin + name_size + extra
        stop = start + info.file_size
        encoding = "utf-8" if flags & _FLAG_UTF8 else "cp437"
        own_name = self.data[begin : begin + name_size].decode(encoding, "replace")
        # All ones: the size is in the extra field. Flagged: it follows the data.
        has_sizes = not flags & _FLAG_SIZES_FOLLOW and size != 2**32 - 1
        agrees = (
            magic == b"PK\x03\x04"
            and own_name == info.orig_filename
            and method == zipfile.ZIP_STORED
            and not flags & _FLAG_ENCRYPTED
            and info.compress_size == info.file_size
            and (not has_sizes or packed == size == info.file_size)
        )
        if not agrees or stop > self.end:
            raise Unreadable(
                f"its member {show(name)} differs from the archive's directory;"
                " download or copy it again"
            )
        return start, stop

    def read(self, name: str, limit: int) -> bytes:
        """Returns a member's bytes, at most `limit`."""
        start, stop = self.span(name)
        if stop - start > limit:
            raise Unreadable(
                f"its member {show(name)} has {stop - start} bytes, the limit is"
                f" {limit}; {ADVICE}"
            )
        return self.data[start:stop]


def _names(infos: list[zipfile.ZipInfo]) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """Returns the common folder of all members, and the members by name within it.

    Raises:
      Unreadable: There are several folders, a repeated name, or a name that leads
        outside.
    """
    folder, members = "", {}
    for info in infos:
        top, _, name = info.orig_filename.partition("/")
        folder = folder or top
        parts = [top, *name.split("/")]
        if top != folder or not {"", ".", ".."}.isdisjoint(parts) or name in members:
            raise Unreadable(
                f"its member {show(info.orig_filename)} is repeated or not under"
                f" the folder {show(folder)}; the file must be one of torch.save"
            )
        members[name] = info
    return folder, members


def show(value: Any) -> str:
    """Returns a short text for a value of the file, without control characters."""
    short = reprlib.Repr()
    short.maxlevel, short.maxtuple, short.maxlist, short.maxdict = 2, 8, 8, 4
    short.maxstring = short.maxother = 100
    return short.repr(value)
