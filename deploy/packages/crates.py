#!/usr/bin/env python3
"""Prints facts about awsvid and all crates that are linked into the program.

crates.py licences   their licences. Each text stands once, below the names of all crates that have
                     it. A crate without a text of its own gets its licence's name.
crates.py sbom       a bill of materials in CycloneDX's form

It reads the output of `cargo metadata` on standard input.
"""

import json
import os
import pathlib
import sys
import time
import tomllib

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
        waiting.extend(dependencies(nodes[package]))
    return sorted(
        (package for package in metadata["packages"] if package["id"] in found),
        key=lambda package: (package["name"], package["version"]),
    )


def dependencies(node):
    """Returns the ids of the packages that this one links. A macro's crate counts as linked."""
    linked_kinds = (dependency for dependency in node["deps"] if any(kind["kind"] is None for kind in dependency["dep_kinds"]))
    return [dependency["pkg"] for dependency in linked_kinds]


def texts(package):
    """Returns the licence texts in the crate's folder."""
    folder = pathlib.Path(package["manifest_path"]).parent
    files = [file for file in folder.iterdir() if file.is_file() and file.name.upper().startswith(NAMES)]
    return [file.read_text(errors="replace").strip() for file in sorted(files)]


def print_licences(metadata):
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


def component(package, checksums):
    """Returns the entry of one package."""
    purl = f"pkg:cargo/{package['name']}@{package['version']}"
    entry = {"type": "library", "bom-ref": purl, "name": package["name"], "version": package["version"], "purl": purl}
    if package["license"]:
        # Cargo permits a slash for OR, and SPDX does not.
        entry["licenses"] = [{"expression": package["license"].replace("/", " OR ")}]
    if checksum := checksums.get((package["name"], package["version"])):
        entry["hashes"] = [{"alg": "SHA-256", "content": checksum}]
    return entry


def print_sbom(metadata):
    lock = tomllib.loads(pathlib.Path(metadata["workspace_root"], "Cargo.lock").read_text())
    checksums = {(package["name"], package["version"]): package.get("checksum") for package in lock["package"]}
    packages = linked(metadata)
    references = {package["id"]: component(package, checksums)["bom-ref"] for package in packages}
    root = metadata["resolve"]["root"]
    [program] = (component(package, checksums) for package in packages if package["id"] == root)
    edges = [
        {"ref": references[node["id"]], "dependsOn": sorted({references[id] for id in dependencies(node)})}
        for node in metadata["resolve"]["nodes"]
        if node["id"] in references
    ]
    when = time.gmtime(int(os.environ["SOURCE_DATE_EPOCH"]))
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", when),
            "component": program | {"type": "application"},
        },
        "components": [component(package, checksums) for package in packages if package["id"] != root],
        "dependencies": sorted(edges, key=lambda edge: edge["ref"]),
    }
    json.dump(bill, sys.stdout, indent=2)
    print()


{"licences": print_licences, "sbom": print_sbom}[sys.argv[1]](json.load(sys.stdin))
