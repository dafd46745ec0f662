"""A call before every load and store of a kernel's optimised code, to the functions of checks.cpp."""

import re

from simt.translate import Unsupported

_BYTES = {"i1": 1, "i8": 1, "i16": 2, "half": 2, "i32": 4, "float": 4, "i64": 8, "double": 8, "ptr": 8}
_TYPE = r"(<\d+ x \w+>|\w+)"
_ADDRESS = r"ptr (addrspace\(3\) )?(.+?)(?:, align (\d+))?(?:, ![^,]+ !\d+)*$"
_LOAD = re.compile(rf"^\s+%\S+ = load (?:volatile )?{_TYPE}, {_ADDRESS}")
_STORE = re.compile(rf"^\s+store (?:volatile )?{_TYPE} (?:<.*>|\S+|.*\)), {_ADDRESS}")
_SET = re.compile(
    r"call void @llvm\.memset\.(p\d)\.i64\(ptr (?:addrspace\(3\) )?(?:\w+ |align \d+ )*(\S+), i8 [^,]+, i64 (\S+),"
)
_COPY = re.compile(
    r"call void @llvm\.mem(?:cpy|move)\.(p\d)\.(p\d)\.i64\(ptr (?:addrspace\(3\) )?(?:\w+ |align \d+ )*(\S+), "
    r"ptr (?:addrspace\(3\) )?(?:\w+ |align \d+ )*(\S+), i64 (\S+),"
)


def instrument(text: str) -> str:
    """The module with the calls; raises Unsupported for an access to memory that it cannot watch."""
    text = re.sub(r"^(@\S+ = )(?:internal|private) (?=(?:\w+ )*(?:constant|global) )", r"\1", text, flags=re.M)
    lines, count = [], 0

    def check(kind, space, address, size, alignment=1):
        nonlocal count
        count += 1
        if space:
            lines.append(f"  %checked.{count} = addrspacecast ptr addrspace(3) {address} to ptr")
            address = f"%checked.{count}"
        lines.append(f"  call void @emu_check_{kind}(ptr {address}, i64 {size}, i64 {alignment})")

    for line in text.splitlines():
        if re.search(r"@llvm\.masked\.(load|store|gather|scatter)", line) and "call" in line:
            raise Unsupported("a masked access to memory, which is not checked")
        if " = load " in line or " load atomic" in line:
            if not (found := _LOAD.match(line)):
                raise Unsupported(f"a load that is not checked: {line.strip()}")
            check("load", found[2], found[3], _size(found[1]), found[4] or 1)
        elif line.lstrip().startswith("store "):
            if not (found := _STORE.match(line)):
                raise Unsupported(f"a store that is not checked: {line.strip()}")
            check("store", found[2], found[3], _size(found[1]), found[4] or 1)
        elif found := _SET.search(line):
            check("store", found[1] == "p3", found[2], found[3])
        elif found := _COPY.search(line):
            check("store", found[1] == "p3", found[3], found[5])
            check("load", found[2] == "p3", found[4], found[5])
        lines.append(line)
    declared = [f"declare void @emu_check_{kind}(ptr, i64, i64)" for kind in ("load", "store")]
    return "\n".join([*lines, *declared]) + "\n"


def _size(kind: str) -> int:
    if vector := re.fullmatch(r"<(\d+) x (\w+)>", kind):
        return int(vector[1]) * _size(vector[2])
    if kind not in _BYTES:
        raise Unsupported(f"an access of type {kind}, which is not checked")
    return _BYTES[kind]
