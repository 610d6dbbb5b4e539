"""Stub CUDA libraries: make a CUDA build of torch importable without the 3 GB of NVIDIA's packages.

torch_xla needs one version of torch, whose package on PyPI is built for CUDA and needs its libraries.
The XLA tests use no GPU: for every library that the dynamic linker does not find, a stub is written beside torch's own
libraries, where the linker searches. Each function of a stub returns 100, CUDA's code for "no device".

usage: python tests/xla/cuda_stubs.py SITE_PACKAGES
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

LAZY = {"libcuda.so.1", "libnvrtc.so.12"}
"""Opened by torch when a GPU is used, not when it is loaded."""
PREFIXES = {
    "cublas": r"cublas(?!Lt)",
    "cublasLt": "cublasLt",
    "cudart": "cuda|__cuda",
    "cudnn": "cudnn",
    "cufft": "cufft",
    "cufile": "cuFile",
    "cupti": "cupti",
    "curand": "curand",
    "cusolver": "cusolver",
    "cusparse": r"cusparse(?!Lt)",
    "cusparseLt": "cusparseLt",
    "nccl": "nccl|pnccl",
    "nvshmem_host": "nvshmem",
}
"""Beginnings of the names of functions, by the library's name without lib and .so."""


def main(site_packages: str) -> None:
    folder = Path(site_packages) / "torch" / "lib"
    libraries = sorted(folder.glob("*.so*"))
    missing = {name for path in libraries for name in _missing(path)} - LAZY
    defined, undefined = _symbols(libraries)
    for library in sorted(missing):
        _write(folder / library, library, defined, undefined)
    print(f"wrote {len(missing)} stub libraries to {folder}")


def _missing(path: Path) -> list[str]:
    found = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False).stdout
    return re.findall(r"(\S+) => not found", found)


def _symbols(libraries: list[Path]) -> tuple[set[str], dict[str, set[str]]]:
    """Return the defined symbols of all libraries, and the undefined ones by their version node (empty: none)."""
    defined: set[str] = set()
    undefined: dict[str, set[str]] = {}
    for path in libraries:
        command = ["nm", "-D", "--with-symbol-versions", str(path)]
        for line in subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines():
            if (match := re.match(r"\s*[0-9a-f]*\s+([A-Za-z])\s+(\S+)$", line)) is None:
                continue
            name, _, version = match[2].partition("@")
            if match[1] == "U":
                undefined.setdefault(version.lstrip("@"), set()).add(name)
            else:
                defined.add(name)
    return defined, undefined


def _write(path: Path, library: str, defined: set[str], undefined: dict[str, set[str]]) -> None:
    """Compile a stub of a library with the functions that torch's libraries use."""
    name = library.removeprefix("lib").partition(".so")[0]
    versions = {version: names for version, names in undefined.items() if version in (library, name.upper()[:7])}
    versioned = {symbol for names in versions.values() for symbol in names}
    plain = undefined.get("", set()) - defined
    prefix = PREFIXES.get(name, re.escape(name))
    functions = sorted(versioned | {symbol for symbol in plain if re.match(prefix, symbol)})
    source = 'static const char *text = "stub: no CUDA";\n'
    for function in functions:
        is_text = re.search(r"GetError(String|Name)$|ResultString", function)
        source += (
            f"const char *{function}() {{ return text; }}\n" if is_text else f"long {function}() {{ return 100; }}\n"
        )
    with tempfile.TemporaryDirectory() as scratch:
        code, script = Path(scratch) / "stub.c", Path(scratch) / "versions.map"
        code.write_text(source)
        script.write_text(
            "".join(
                f"{version} {{ global: {' '.join(f'{n};' for n in sorted(names))} }};\n"
                for version, names in versions.items()
            )
        )
        command = ["cc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library}", str(code), "-o", str(path)]
        if versions:
            command.append(f"-Wl,--version-script={script}")
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1])
