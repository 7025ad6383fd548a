"""Characters in texts that are probably damage, and their removal."""

import re
import unicodedata

# \t, \n and \r are text. \x85 and the other C1 controls are what a Windows encoding leaves when it is read as Latin-1.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_MARKS = re.compile("[\ufeff\ufffe\uffff\u202d\u202e]")  # byte order marks inside a text, non-characters, overrides
# UTF-8 that was read as Windows-1252 or Latin-1. Only sequences that no language writes: "Ã©", "â€™", "ðŸ˜".
_MOJIBAKE = re.compile("[\u00c2\u00c3][\u0080-\u009f\u00a1-\u00ba\u00bc-\u00bf]|\u00e2\u20ac[\u0080-\u00bf™œ˜¦“”¢]|ðŸ")

PATTERNS = {
    "control_characters": _CONTROL,
    "invisible_marks": _MARKS,
    "replacement_characters": re.compile("\ufffd"),
    "mojibake": _MOJIBAKE,
}
_ANY = re.compile("|".join(pattern.pattern for pattern in PATTERNS.values()))


def odd_characters(text: str) -> list[tuple[str, str]]:
    """Returns (code, the first such character) for each entry of `PATTERNS` that the text contains."""
    if not (_CONTROL if text.isascii() else _ANY).search(text):
        return []
    found = ((code, pattern.search(text)) for code, pattern in PATTERNS.items())
    return [(code, match[0].encode("unicode_escape").decode()) for code, match in found if match]


def cleaned(text: str) -> str:
    """Returns the text in Unicode's form NFC, with \\n as line end, without control characters and invisible marks."""
    text = text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = _MARKS.sub("", text)
    return _CONTROL.sub("", text)
