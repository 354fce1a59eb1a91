#!/usr/bin/env python3
"""Prints awsvid's licence and those of all crates that are linked into the program.

It reads the output of `cargo metadata` on standard input. Each text stands once, below the names
of all crates that have it. A crate without a text of its own gets its licence's name.
"""

import json
import pathlib
import sys

NAMES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "COPYRIGHT", "UNLICENSE")


def linked(metadata):
    """Returns the packages that the program links: no build script's, no test's."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    found, waiting = set(), [metadata["resolve"]["root"]]
    while waiting:
        package = waiting.pop()
        if package in found:
            continue
        found.add(package)
        for dependency in nodes[package]["deps"]:
            if any(kind["kind"] is None for kind in dependency["dep_kinds"]):
                waiting.append(dependency["pkg"])
    return sorted(
        (package for package in metadata["packages"] if package["id"] in found),
        key=lambda package: (package["name"], package["version"]),
    )


def texts(package):
    """Returns the licence texts in the crate's folder. A macro's crate counts as linked."""
    folder = pathlib.Path(package["manifest_path"]).parent
    files = [file for file in folder.iterdir() if file.is_file() and file.name.upper().startswith(NAMES)]
    return [file.read_text(errors="replace").strip() for file in sorted(files)]


def main():
    metadata = json.load(sys.stdin)
    crates_by_text, without = {}, []
    packages = linked(metadata)
    for package in packages:
        label = f"{package['name']} {package['version']} ({package['license'] or 'see its text'})"
        for text in texts(package):
            crates_by_text.setdefault(" ".join(text.split()), (text, []))[1].append(label)
        if not texts(package):
            without.append(f"{label}, {package['repository'] or 'no repository'}")
    own = pathlib.Path(metadata["workspace_root"], "LICENSE").read_text()
    print("awsvid\n\n" + own)
    print(f"\nThe program contains {len(packages) - 1} crates of others, under these licences.\n")
    for text, crates in crates_by_text.values():
        if crates != [label for label in crates if label.startswith("awsvid ")]:
            print("=" * 78 + "\n" + "\n".join(crates) + "\n" + "-" * 78 + "\n" + text + "\n")
    if without:
        print("=" * 78 + "\nCrates without a text of their own:\n" + "\n".join(without))


main()
