"""From the LLVM IR that numba-cuda makes for a GPU kernel to a module for this machine's processor.

The kernel's own IR is kept; only what a processor does not know is replaced, by name: special registers, barriers and
warp intrinsics, inline PTX, functions of libdevice. Each becomes a call of a function in runtime.cpp or ptx.cpp. What
has no replacement raises `Unsupported`, so that nothing is skipped in silence.
"""

import re

import llvmlite.binding as llvm


class Unsupported(NotImplementedError):
    """An instruction that the emulator does not have."""


# PTX text -> (function of ptx.cpp, results, their type); a group in the pattern becomes an argument after the others
_PTX = (
    (r"cp\.async\.c[ag]\.shared\.global \[\$0\], \[\$1\], 4, \$2;", "emu_cp_async_4", 0, ""),
    (r"cp\.async\.c[ag]\.shared\.global \[\$0\], \[\$1\], 8, \$2;", "emu_cp_async_8", 0, ""),
    (r"cp\.async\.cg\.shared\.global \[\$0\], \[\$1\], 16, \$2;", "emu_cp_async_16", 0, ""),
    (r"cp\.async\.commit_group;", "emu_cp_async_commit", 0, ""),
    (r"cp\.async\.wait_group (\d+);", "emu_cp_async_wait", 0, ""),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16 .*", "emu_ldmatrix_x4", 4, "i32"),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16 .*", "emu_ldmatrix_x4_trans", 4, "i32"),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x2\.shared\.b16 .*", "emu_ldmatrix_x2", 2, "i32"),
    (r"ldmatrix\.sync\.aligned\.m8n8\.x2\.trans\.shared\.b16 .*", "emu_ldmatrix_x2_trans", 2, "i32"),
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32 .*", "emu_mma_f16", 4, "float"),
    (r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.tf32\.tf32\.f32 .*", "emu_mma_tf32", 4, "float"),
    (r"cvt\.rna\.tf32\.f32 \$0, \$1;", "emu_cvt_tf32", 1, "i32"),
    (r"mov\.b32 \$0, \$1;", "emu_mov_32", 1, "i32"),
    (r"mov\.b64 \$0, \$1;", "emu_mov_64", 1, "i64"),
)
# Intrinsics with a plain result
_RENAMED = {
    "llvm.nvvm.barrier0": "simt_barrier",
    "llvm.nvvm.barrier0.popc": "emu_barrier_popc",
    "llvm.nvvm.barrier0.and": "emu_barrier_and",
    "llvm.nvvm.barrier0.or": "emu_barrier_or",
    "llvm.nvvm.bar.warp.sync": "emu_syncwarp",
}
# Intrinsics that return a pair of a word and a bit, which a function in C returns as one 64-bit number
_PAIRS = {
    "llvm.nvvm.shfl.sync.i32": ("emu_shfl", "i32, i32, i32, i32, i32"),
    "llvm.nvvm.vote.sync": ("emu_vote", "i32, i32, i1"),
}
# Functions of libdevice that the C library has under another name, or not at all
_OWN_LIBDEVICE = {
    "rsqrtf", "rsqrt", "fast_expf", "fast_logf", "fast_fdividef", "isnanf", "isnand", "isinff", "isinfd",
}  # fmt: skip
_C_LIBRARY = {
    name + suffix
    for name in ("exp", "expm1", "log", "log1p", "sqrt", "tanh", "pow", "fabs", "fmax", "fmin", "floor", "ceil", "erf",
                 "sin", "cos", "exp2", "log2")
    for suffix in ("", "f")
}  # fmt: skip


GAP = 64  # elements behind every shared array


def translate(text: str) -> str:
    text = re.sub(r'target triple = "[^"]*"', f'target triple = "{llvm.get_process_triple()}"', text)
    text = re.sub(r'target datalayout = "[^"]*"\n', "", text)
    # the annotations would make the entry a kernel in NVIDIA's calling convention
    text = re.sub(r"^!nvvm\.annotations.*$", "", text, flags=re.M)
    text = re.sub(r"internal addrspace\(3\) global \[(\d+) x ([^\]]*)\] undef", _shared_array, text)
    text = _replace_dynamic_shared(text)
    text = re.sub(r'"llvm\.nvvm\.read\.ptx\.sreg\.([a-z.]+)"', lambda m: f'"simt_sreg_{m[1].replace(".", "_")}"', text)
    for name, ours in _RENAMED.items():
        text = text.replace(f'"{name}"', f'"{ours}"')
    # as on the GPU, no optimisation may put a barrier into two places
    barriers = "|".join(v for k, v in _RENAMED.items() if "barrier" in k)
    text = re.sub(rf'^(declare \S+ @"(?:{barriers})"\([^)]*\)).*$', r"\1 convergent", text, flags=re.M)
    for name, (ours, arguments) in _PAIRS.items():
        text = _replace_pair(text, name, ours, arguments)
    text = re.sub(r'"__nv_(\w+)"', _libdevice, text)
    text = _replace_ptx(text)
    left = sorted(set(re.findall(r'@"?(llvm\.nvvm\.[\w.]+)', text)))
    if left:
        raise Unsupported(f"no emulation for {', '.join(left)}")
    return text


def _replace_dynamic_shared(text):
    """Its address is the launch's, not the code's."""
    name, ours = '@"dynamic_shared_memory"', '@"simt_dynamic_shared"()'
    text, uses = re.subn(rf"addrspacecast \[0 x i8\] addrspace\(3\)\* {name} to \[0 x i8\]\*", f"call ptr {ours}", text)
    text = re.sub(rf"^{name} = .*$", "", text, flags=re.M)
    if name in text:
        raise Unsupported("a use of dynamic shared memory other than its address")
    return text + f"declare ptr {ours}\n" * (uses > 0)


def _shared_array(match):
    """Visible to the runtime, and longer than it is for the kernel, so that an access beyond its end is seen as one."""
    return f"addrspace(3) global [{int(match[1]) + GAP} x {match[2]}] zeroinitializer"


def _libdevice(match):
    name = match[1]
    if name in _OWN_LIBDEVICE:
        return f'"emu_nv_{name}"'
    if name in _C_LIBRARY:
        return f'"{name}"'
    raise Unsupported(f"no emulation for libdevice's __nv_{name}")


def _replace_pair(text, name, ours, arguments):
    pattern = rf'declare \{{i32, i1\}} @"{re.escape(name)}"\([^\n]*\)'
    if not re.search(pattern, text):
        return text
    types = arguments.split(", ")
    named = ", ".join(f"{t} %a{i}" for i, t in enumerate(types))
    wrapper = f"""declare i64 @"{ours}"({arguments})
define {{i32, i1}} @"pair_{ours}"({named}) {{
  %whole = call i64 @"{ours}"({named})
  %word = trunc i64 %whole to i32
  %above = lshr i64 %whole, 32
  %bit = trunc i64 %above to i1
  %first = insertvalue {{i32, i1}} undef, i32 %word, 0
  %both = insertvalue {{i32, i1}} %first, i1 %bit, 1
  ret {{i32, i1}} %both
}}"""
    return re.sub(pattern, wrapper, text).replace(f'"{name}"', f'"pair_{ours}"')


_CALL = re.compile(
    r"^(?P<indent>\s*)(?:(?P<result>%\S+) = )?(?:tail )?call (?P<type>\{[^}]*\}|\w+)(?: \([^)]*\))? "
    r"asm\s+(?:sideeffect\s+)?"
    r'"(?P<text>[^"]*)", "[^"]*"\((?P<arguments>[^)]*)\)',
    re.M,
)


def _replace_ptx(text):
    declared, calls = {}, 0

    def replace(match):
        nonlocal calls
        calls += 1
        ours, results, element, extra = _find_ptx(match["text"])
        arguments = [a.strip() for a in match["arguments"].split(",") if a.strip()] + [f"i32 {n}" for n in extra]
        types = ", ".join(a.split(" ")[0] for a in arguments)
        returned = element if results == 1 else "void"
        declared[ours] = f'declare {returned} @"{ours}"({types})'
        call = f'call {returned} @"{ours}"({", ".join(arguments)})'
        indent, result = match["indent"], match["result"]
        if results < 2:
            return f"{indent}{result} = {call}" if results else f"{indent}{call}"
        lines = [call, f'%results.{calls} = call {element}* @"emu_results"()']
        before = "undef"
        for i in range(results):
            place, value = f"%place.{calls}.{i}", f"%value.{calls}.{i}"
            whole = result if i == results - 1 else f"%whole.{calls}.{i}"
            lines += [
                f"{place} = getelementptr {element}, {element}* %results.{calls}, i32 {i}",
                f"{value} = load {element}, {element}* {place}",
                f"{whole} = insertvalue {match['type']} {before}, {element} {value}, {i}",
            ]
            before = whole
        declared["emu_results"] = 'declare ptr @"emu_results"()'
        return "\n".join(indent + line for line in lines)

    text = _CALL.sub(replace, text)
    if re.search(r"\basm\b", text):
        raise Unsupported("inline PTX that the translation did not recognise as a call")
    return text + "\n" + "\n".join(declared.values()) + "\n"


def _find_ptx(text):
    for pattern, ours, results, element in _PTX:
        match = re.fullmatch(pattern, text)
        if match:
            return ours, results, element, match.groups()
    raise Unsupported(f"no emulation for the PTX instruction {text!r}")
