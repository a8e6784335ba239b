"""Personal data and secrets: found by their shape and, where there is one, their check digit; dropped or masked.

| kind | shape | source |
|---|---|---|
| email | address outside the reserved domains; `name [at] host [dot] net` | RFC 5322, reserved: RFC 2606 |
| phone | +CC or 00CC, 8 to 15 digits; (NNN) NNN-NNNN; a trunk 0, grouped or after "call" | E.164; fiction and toll-free stay |
| card | 14 to 19 digits with an issuer's prefix and length, Luhn | ISO/IEC 7812; payment sandboxes' test numbers stay |
| iban | country, its length, mod 97 | ISO 13616 |
| key | prefixes that issuers chose so that scanners find them; private key blocks; JWT | the issuers' documentation |
"""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

from factory.filters.said import longest
from factory.filters.shapes import RowFilter
from factory.rows import Sample, Verdict

Kind: TypeAlias = Literal["key", "email", "iban", "card", "phone"]


class Found(NamedTuple):
    """Where something stands in a text."""

    kind: Kind
    start: int
    end: int


# -- e-mail ------------------------------------------------------------------------------------------------------------

_EMAIL = re.compile(r"(?<![\w@/])[\w.!#$%&'*+=?^{}~-]{0,64}[\w+]@(?:[\w-]+\.)+([^\W\d_]{2,24})\b")
_EMAIL_SAID = re.compile(
    r"\b[\w.+-]{1,64}(?: dot [\w-]{1,64})? ?(?:[\[(] ?at ?[\])]|\bat\b) ?[\w-]+ ?(?:[\[(] ?dot ?[\])]|\bdot\b) ?[a-z]{2,10}\b"
    r"|\b[\w.+-]{1,64} ?[\[(] ?at ?[\])] ?[\w-]+\.[a-z]{2,10}\b",
    re.IGNORECASE,
)
_SAID = ("dot]", "DOT]", "dot)", "DOT)", "[at", "[AT", "[ at", "(at", "(AT", "( at")
_RESERVED = re.compile(r"(?:[@.]example\.(?:com|org|net)|\.(?:example|test|invalid|localhost|local))\Z", re.IGNORECASE)


def _emails(text: str) -> Iterator[Found]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            if not _RESERVED.search(match.group()) and not match.group().startswith("git@"):
                yield Found("email", *match.span())
    said = ("(" in text or "[" in text) and any(map(text.__contains__, _SAID))
    if said or " dot " in text or " DOT " in text:
        yield from (Found("email", *match.span()) for match in _EMAIL_SAID.finditer(text))


# -- numbers -----------------------------------------------------------------------------------------------------------

_OTHERS = bytes(byte for byte in range(256) if not chr(byte).isdecimal())
_NEAR = 7
_LONG = re.compile(r"[0-9](?:[ ()./-]{0,3}[0-9]){6}")
"""So many digits near each other: without them there is no phone, card or account."""
_PHONE = re.compile(
    r"""(?<![\w.+-])(?:
      \+[1-9](?:[ ()./-]{0,3}\d){7,14}
    | (?<!\d[ ])00[1-9](?:[ /-]?\d){8,13}
    | (?:1[ .-])?(?:\([2-9]\d\d\)[ ]?|[2-9]\d\d([.-]))[2-9]\d\d(?(1)\1|[ -])\d{4}
    | \(0[1-9]\d{1,3}\)[ ]?\d{4,9}
    | 0[1-9]\d{1,3}(?:[ ]?[/-][ ]?|[ ])\d{5,8}
    | 0[1-9]\d[ ]\d{4}[ ]\d{4}
    | (?:(?<=tel:)|(?<=fon:))0\d{8,12}
    )(?![\w-]|[.,]\d)""",
    re.VERBOSE,
)
_CALLED = re.compile(
    r"\b(?:tel|phone|telephone|mobile?|cell|whatsapp|fax|handy|telefon|téléphone|portable|teléfono|móvil|call|ring|text"
    r"|reach|appelez|llame|number|nummer|numéro|número)\b[^\d\n+]{0,25}?((?:\(?0|[2-9]\d\d )[1-9](?:[ ()./-]{0,3}\d){6,10})(?!\w)",
    re.IGNORECASE,
)  # fmt: skip
_FICTION = re.compile(r"555[ .-]?01\d\d\Z|^(?:\+44 ?|0)(?:7700 ?900|1632 ?960|20 ?7946 ?0)")
_TOLL_FREE = re.compile(r"^\+?1?[ .(-]*8(?:00|33|44|55|66|77|88)\b")
_CARD = re.compile(
    r"(?<![\w.-])(?<![A-Za-z]{2}\d\d )(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|\d{4}([ -])\d{6}\2\d{4,5}|\d{14,19})(?![\w-]|\.\d)"
)
_ISSUERS = re.compile(
    r"4(?:\d{15}|\d{18})|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}|3(?:0[0-5]|[68]\d)\d{11}"
    r"|(?:6011|65\d\d|64[4-9]\d|35(?:2[89]|[3-8]\d)|62\d\d|50\d\d|5[6-9]\d\d|6[0-9]\d\d)\d{12,15}"
)
_TEST_CARDS = frozenset(
    [
        "4242424242424242", "4111111111111111", "4000000000000002", "4012888888881881", "5555555555554444", "5105105105105100",
        "378282246310005", "371449635398431", "6011111111111117", "3530111333300000", "30569309025904",
    ]
)  # fmt: skip


def luhn(digits: str) -> bool:
    """Every second digit from the right is doubled and its digits summed; the total ends in 0."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(map(int, digits[::-2])) + sum(doubled)) % 10 == 0


def _cards(text: str) -> Iterator[Found]:
    for match in _CARD.finditer(text):
        digits = re.sub(r"\D", "", match.group())
        if _ISSUERS.fullmatch(digits) and luhn(digits) and digits not in _TEST_CARDS:
            yield Found("card", *match.span())


def _phones(text: str) -> Iterator[Found]:
    for pattern, group in ((_PHONE, 0), (_CALLED, 1)):
        for match in pattern.finditer(text):
            number = match.group(group)
            if not (_FICTION.search(number) or _TOLL_FREE.search(number)):
                yield Found("phone", *match.span(group))


# -- accounts ----------------------------------------------------------------------------------------------------------

_COUNTRIES = """
AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DK18 DO28 EE20 EG29 ES24 FI18 FO18 FR27 GB22 GE22
GI23 GL18 GR27 GT28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 MC27 MD24 ME22 MK19 MR27 MT31
MU30 NL18 NO15 PK24 PL28 PS29 PT25 QA29 RO24 RS22 SA24 SC31 SE24 SI19 SK24 SM27 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20
"""
_LENGTHS = {code[:2]: int(code[2:]) for code in _COUNTRIES.split()}
_IBAN = re.compile(r"(?<![A-Za-z0-9])([A-Za-z]{2})\d\d(?=[ -]?[A-Za-z0-9]{3,4}[ -]?\d)")


def mod97(iban: str) -> bool:
    """The first four characters go to the end, letters count from A = 10; the remainder by 97 is 1."""
    return int("".join(str(int(c, 36)) for c in iban[4:] + iban[:4])) % 97 == 1


def _ibans(text: str) -> Iterator[Found]:
    for match in _IBAN.finditer(text):
        length = _LENGTHS.get(match.group(1).upper())
        whole = length and re.compile(rf"[A-Za-z0-9](?: ?[A-Za-z0-9]){{{length - 1}}}(?![A-Za-z0-9])").match(
            text, match.start()
        )
        if whole and mod97(whole.group().replace(" ", "")):
            yield Found("iban", *whole.span())


# -- keys --------------------------------------------------------------------------------------------------------------

KEY = re.compile(
    r"""(?<![\w-])(?:
      (?:AKIA|ASIA)[A-Z2-7]{16}(?!\w)
    | gh[pousr]_[A-Za-z0-9]{36,} | github_pat_\w{50,} | glpat-[\w-]{20,} | npm_[A-Za-z0-9]{36} | pypi-AgEI[\w-]{40,}
    | sk-(?:proj-|ant-|svcacct-|or-v1-)[\w-]{20,} | sk-[A-Za-z0-9]{20,} | gsk_[A-Za-z0-9]{40,} | hf_[A-Za-z]{30,} | AIza[\w-]{35}
    | [sr]k_live_[A-Za-z0-9]{16,} | shpat_[0-9a-f]{32} | dop_v1_[0-9a-f]{64} | SG\.[\w-]{20,}\.[\w-]{40,}
    | xox[abeprs]-[\w-]{20,} | xapp-\d-[\w-]{20,}
    | eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{20,}
    )
    | hooks\.slack\.com/services/T\w+/B\w+/\w{20,}
    | -----BEGIN\ [A-Z ]{0,20}PRIVATE\ KEY(?:\ BLOCK)?-----\s+(?:[\w-]+:[^\n]*\n)*\s*[A-Za-z0-9+/=\s]{40,}(?:-----END[^\n]*-----)?
    | (?i:aws_secret_access_key["']?\s{0,3}[=:]\s{0,3}["']?)[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])
    | AccountKey=[A-Za-z0-9+/]{86}==""",
    re.VERBOSE,
)
_PREFIXES = (
    "AKIA", "ASIA", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "npm_", "pypi-", "sk-", "gsk_", "hf_", "AIza",
    "k_live_", "shpat_", "dop_v1_", "SG.", "xox", "xapp-", "eyJ", "hooks.slack", "access_key", "ACCESS_KEY", "AccountKey",
)  # fmt: skip
UNBROKEN = 20
"""Characters without a blank in the shortest of them (AKIA ...); private key blocks aside."""
VARIED = 8
"""Different characters that a real key has at least; a placeholder is xxxx or 0000."""


def _keys(text: str) -> Iterator[Found]:
    if (longest(text) >= UNBROKEN and any(map(text.__contains__, _PREFIXES))) or "PRIVATE KEY" in text:
        for match in KEY.finditer(text):
            if len(set(match.group()[8:])) >= VARIED and "EXAMPLE" not in match.group():
                yield Found("key", *match.span())


# -- all of them -------------------------------------------------------------------------------------------------------


def personal_data(text: str) -> list[Found]:
    """What a text holds, in its order; where two kinds overlap, the first of: key, e-mail, account, card, phone."""
    found = [*_keys(text), *_emails(text)]
    digits = len(text.encode(errors="replace").translate(None, _OTHERS))
    if digits >= _NEAR and _LONG.search(text):
        found += [*_ibans(text), *_cards(text), *_phones(text)]
    if len(found) < 2:
        return found
    apart: list[Found] = []
    for one in found:
        if all(one.end <= other.start or other.end <= one.start for other in apart):
            apart.append(one)
    return sorted(apart, key=lambda one: one.start)


def masked(text: str) -> str:
    """The text with each of them replaced by its kind: "[EMAIL]"; a text without any is given back as it is."""
    parts, at = list[str](), 0
    for kind, start, end in personal_data(text):
        parts += text[at:start], f"[{kind.upper()}]"
        at = end
    return "".join(parts) + text[at:]


class PersonalData(RowFilter):
    """Drops answers with personal data or secrets; the evidence is masked too."""

    kind: Literal["personal_data"] = "personal_data"

    def check(self, sample: Sample) -> Verdict:
        found = personal_data(sample.response)
        if not found:
            return self.keep()
        kind, start, _ = found[0]
        around = sample.response[max(start - 30, 0) : start] + f"[{kind.upper()}]"
        return self.drop(f"personal_data:{kind}", score=len(found), evidence=masked(around))
