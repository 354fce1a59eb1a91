# Prints the limits of STS's parameters, as AWS's own model has them: for each shape its least and
# its greatest length, and the ranges of the characters that its pattern accepts.
import functools
import json
import sys
import unicodedata

from awscli.botocore.loaders import Loader


def accepts(content):
    """Returns the test of one character by the content of a class, as in `\\w+=,.@-`."""
    ranges, categories, i = [], set(), 0

    def single():
        nonlocal i
        if content[i] != "\\":
            i += 1
            return content[i - 1]
        if content[i + 1] == "u":
            i += 6
            return chr(int(content[i - 4 : i], 16))
        i += 2
        return content[i - 1]

    while i < len(content):
        if content.startswith("\\w", i):
            ranges += [("a", "z"), ("A", "Z"), ("0", "9"), ("_", "_")]
            i += 2
        elif content.startswith("\\p{", i):
            categories.add(content[i + 3])
            i += 5
        else:
            first = single()
            last = first
            if content[i : i + 1] == "-" and i + 1 < len(content):
                i += 1
                last = single()
            ranges.append((first, last))
    return lambda c: any(a <= c <= b for a, b in ranges) or unicodedata.category(c)[0] in categories


@functools.cache
def accepted(content):
    test, found = accepts(content), []
    for code in range(sys.maxunicode + 1):
        if 0xD800 <= code < 0xE000 or not test(chr(code)):
            continue
        if found and found[-1][1] == code - 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return found


shapes = Loader().load_service_model("sts", "service-2")["shapes"]
limits = {}
for name in sys.argv[1:]:
    shape = shapes[name]
    pattern = shape.get("pattern")
    limits[name] = {
        "min": shape.get("min", 0),
        "max": shape.get("max"),
        # A pattern is one class, which may repeat.
        "accepted": accepted(pattern[1 : pattern.rindex("]")]) if pattern else [],
    }
print(json.dumps(limits))
