#!/usr/bin/env python3
"""Writes a container image to a file, without a daemon, a network or a base image.

    archive.py OUT.tar NAME:TAG [--entrypoint PATH] [--user UID:GID] LAYER...

Each LAYER is a tar file, or a folder whose content becomes the root of a layer (owned by root, with no times). The file is
what `docker save` writes, so `ctr images import`, `docker load`, `podman load` and `kind load image-archive` all take it.

Invariant: the same layers and options give the same bytes, and OUT.tar is there only when it is whole.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import sys
import tarfile
import tempfile
from pathlib import Path

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
SEARCH_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CHUNK = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("name")
    parser.add_argument("--entrypoint")
    parser.add_argument("--user", default="")
    parser.add_argument("layers", nargs="+", type=Path)
    options = parser.parse_args()
    if ":" not in options.name:
        sys.exit(f"error: an image's name needs a tag: {options.name}:TAG")
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        sys.exit(f"error: images for {machine} are not known here")
    with tempfile.TemporaryDirectory(dir=options.out.parent) as scratch:
        layers = [as_tar(layer, Path(scratch) / f"{number}.tar") for number, layer in enumerate(options.layers)]
        whole = Path(scratch) / "image.tar"
        write_image(whole, layers, options, ARCHITECTURES[machine])
        whole.replace(options.out)


def as_tar(layer: Path, to: Path) -> Path:
    """A folder as a tar file, in an order that does not depend on the file system."""
    if not layer.is_dir():
        return layer
    with tarfile.open(to, "w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(layer.rglob("*")):
            entry = tar.gettarinfo(path, arcname=str(path.relative_to(layer)))
            # A hard link would be to a name that this machine gave it first.
            if entry.islnk():
                entry.type, entry.linkname, entry.size = tarfile.REGTYPE, "", path.stat().st_size
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = 0
            if entry.isreg():
                with path.open("rb") as content:
                    tar.addfile(entry, content)
            else:
                tar.addfile(entry)
    return to


def digest(path: Path) -> str:
    hasher = hashlib.sha256()
    with path.open("rb") as content:
        while chunk := content.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def write_image(out: Path, layers: list[Path], options: argparse.Namespace, architecture: str) -> None:
    digests = [digest(layer) for layer in layers]
    config = {"Env": [SEARCH_PATH], "WorkingDir": "/"}
    if options.user:
        config["User"] = options.user
    if options.entrypoint:
        config["Entrypoint"] = [options.entrypoint]
    described = as_json(
        {
            "architecture": architecture,
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{one}" for one in digests]},
            "history": [{"created_by": "floodmark"} for _ in layers],
        }
    )
    config_name = hashlib.sha256(described).hexdigest() + ".json"
    layer_names = [f"{one}/layer.tar" for one in digests]
    manifest = [{"Config": config_name, "RepoTags": [options.name], "Layers": layer_names}]
    with tarfile.open(out, "w", format=tarfile.GNU_FORMAT) as tar:
        put(tar, config_name, len(described), io.BytesIO(described))
        for name, layer in zip(layer_names, layers):
            with layer.open("rb") as content:
                put(tar, name, os.fstat(content.fileno()).st_size, content)
        listed = as_json(manifest)
        put(tar, "manifest.json", len(listed), io.BytesIO(listed))


def as_json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def put(tar: tarfile.TarFile, name: str, size: int, content: io.BufferedIOBase) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = size
    tar.addfile(entry, content)


if __name__ == "__main__":
    main()
