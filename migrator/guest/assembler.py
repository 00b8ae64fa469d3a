"""Machine code put together byte by byte, with the same program for people beside it."""

from __future__ import annotations

SECTOR_SIZE = 512

_BOOTABLE = b"\x55\xaa"


class Assembly:
    """Collects bytes; labels may be used before they are placed.

    :ivar origin: where the first byte is loaded
    :ivar listing: the same program in GNU assembler's Intel syntax, line by line
    """

    def __init__(self, origin: int) -> None:
        self.origin = origin
        self.listing: list[str] = []
        self._code = bytearray()
        self._labels: dict[str, int] = {}
        self._fixups: list[tuple[int, int, str, str]] = []

    def label(self, name: str, offset: int = 0) -> None:
        """Name the address of what comes next, plus ``offset``."""
        self._labels[name] = self.origin + len(self._code) + offset
        self.listing.append(f"{name} = . + {offset}" if offset else f"{name}:")

    def op(self, encoding: str, mnemonic: str) -> None:
        """Append an instruction.

        :param encoding: hex bytes; ``imm32:n`` is a number, ``rel8:label`` the distance to a
            label and ``abs16:label`` its address, each of as many bits as its name says
        :param mnemonic: the same for people; the tests assemble it and compare
        """
        self.listing.append(f"    {mnemonic}")
        for part in encoding.split():
            kind, _, value = part.partition(":")
            if not value:
                self._code += bytes.fromhex(part)
                continue
            size = int(kind[3:]) // 8
            if kind.startswith("imm"):
                self._code += int(value).to_bytes(size, "little")
            else:
                self._fixups.append((len(self._code), size, kind[:3], value))
                self._code += bytes(size)

    def end_boot_sector(self) -> None:
        """Pad what there is to a sector with the boot signature; what follows is in the next.

        :raise ValueError: it is more than a sector
        """
        self._pad(SECTOR_SIZE - len(_BOOTABLE))
        self._code += _BOOTABLE
        self.listing.append("    .byte 0x55, 0xaa")

    def finish(self, size: int) -> bytes:
        """Resolve the labels.

        :param size: how many bytes it may take, and is padded to
        :raise OverflowError: a jump is too far
        :raise ValueError: it is more than that
        """
        self._pad(size)
        for at, width, kind, name in self._fixups:
            value = self._labels[name]
            if kind == "rel":
                value -= self.origin + at + width
            self._code[at : at + width] = value.to_bytes(width, "little", signed=kind == "rel")
        return bytes(self._code)

    def _pad(self, size: int) -> None:
        if len(self._code) > size:
            raise ValueError(f"{len(self._code)} bytes of code do not fit {size}")
        self._code = self._code.ljust(size, b"\0")
        self.listing.append(f"    .org {size}")
