"""The lexical rules of Penn Treebank tokenization, as the COCO evaluation applies them.

Written from the behaviour of Stanford's tokenizer 3.4.1 (the version the COCO evaluation ships),
to which the tests compare it.  At each position the rule with the longest match wins, its context
included; of equally long ones the first.  A rule is a pattern whose group 1 is the token and whose
rest is context, and a function from the token's text to what is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from rayrl.rewards.ptb_characters import ALPHA, DIGITS, MARKS, SYMBOLS

Write = Callable[[str], str]

_SPACE = " \t\u00a0\u2000-\u200a\u3000"
_GAP = f"[{_SPACE}\n\r\u000b\u000c\u2028\u2029\u0085]"
_APOS = "(?:['\u2019\u0092]|(?i:&apos;))"
_ELISION = f"(?:{_APOS}|[`\u0091\u2018\u201b])"
_D = f"[{DIGITS}]"
_ALNUM = f"[{ALPHA}{DIGITS}]"
_LETTER = f"(?:[{ALPHA}{MARKS}]|&[aeiouAEIOU](?i:acute|grave|uml);)"
_LETTERS_DIGITS = f"(?:{_LETTER}|{_D})*"
_WORD = f"{_LETTER}{_LETTERS_DIGITS}(?:[.!?]{_LETTER}{_LETTERS_DIGITS})*"
_HYPHEN = "[-_\u058a\u2010\u2011]"

# Abbreviations: those that may end a sentence, and those that expect something after them.
_FREE_ABBREVIATIONS = (
    "al ala apr ariz assn aug bancorp bhd blvd bldg bros calif co colo conn corp cos ct dak dec "
    "esq est etc ext feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich "
    "minn mo mon mont neb nev nov oct okla penn plc rd rt sep sept seq sq sr sys tel tenn thu "
    "thurs tue tues univ va vt wed wis wisc wyo"
)
_BOUND_ABBREVIATIONS = (
    "adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cpl dept det dr "
    "drs elec ens ft gen gov govs hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr "
    "mt natl pfc ph pres prof profs pvt rep reps rev sen sens sfc sgt spc st ste supt supts "
    "treas vs wm"
)
_CAPITAL_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_NUMBERED_ABBREVIATIONS = "art bldg ca fig figs no nos op pp prop"
_SENTENCE_STARTERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last "
    "Many More Now Once One Other Our She Since So Some Such That The Their Then There These They "
    "This We What When While Yet You"
)


def _any_of(words: str) -> str:
    return "(?:" + "|".join(words.split()) + ")"


_INITIALS = r"[A-Za-z](?:\.[A-Za-z])*"
_COMPOUND_INITIALS = (
    r"(?:[A-Za-z](?:\.[A-Za-z])+"
    r"|(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R)))"
)
_FREE_ABBREVIATION = (
    f"(?:[Pp]p?t[ey]s?|(?i:cont'd|(?:ph|ed)\\.d|{_any_of(_FREE_ABBREVIATIONS)})"
    f"|{_any_of(_CAPITAL_ABBREVIATIONS)}|{_any_of(_CAPITAL_ABBREVIATIONS.upper())})"
)
_STARTER = "(?:" + "|".join(f"{w[0]}(?i:{w[1:]})" for w in _SENTENCE_STARTERS.split()) + ")"

_SGML_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
_SGML = (
    r"<(?:[!?][A-Za-z-][^>\r\n]*"
    f"|/{_SGML_NAME} *"
    f"|{_SGML_NAME}(?: +{_SGML_NAME}(?: *= *(?:'[^'\r\n]*'|\"[^\"\r\n]*\"))?)* */? *)>"
)
_NOT_IN_URL = r' \t\n\f\r"<>|(){}'
_URL_END = f"[^{_NOT_IN_URL}.!?,-]"
_HOST = (
    rf"(?:(?i:www)\.(?:[^{_NOT_IN_URL}.!?,]+\.)+[A-Za-z]{{2,4}}"
    rf"|(?:[^{_NOT_IN_URL}`'.!?,-_$]+\.)+(?i:com|net|org|edu))"
)
_NOT_IN_EMAIL = r' \t\n\f\r"<>|(){}\u00a0'
_EMAIL = (
    f"(?:&lt;|<)?[A-Za-z0-9][^{_NOT_IN_EMAIL}]*@"
    rf"(?:[^{_NOT_IN_EMAIL}.]+\.)*[^{_NOT_IN_EMAIL}.]+(?:&gt;|>)?"
)
_FILE_TYPES = (
    "bat bmp c class cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php "
    "pl png ppt ps py sql tar txt wav x xml zip"
)
_PHONE = (
    r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
    r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}"
    r"|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"
)
_APOSTROPHE_WORD = (
    f"{_APOS}n{_APOS}?|[ldj]{_APOS}|dunkin{_APOS}|somethin{_APOS}|ol{_APOS}|{_APOS}em"
    f"|{_APOS}[2-9]0s|{_APOS}till?|{_APOS}cause|c{_APOS}mon|e{_APOS}er|s{_APOS}mores|ev{_APOS}ry|li{_APOS}l|nat{_APOS}l|ne{_APOS}er|nor{_APOS}easter"
    f"|o{_APOS}(?:clock|er)|o{_ELISION}o|cont{_APOS}d"
)
_FACE_EDGE = r"[-^x=~<>']"


def _same(text: str) -> str:
    return text


def _nothing(_: str) -> str:
    return ""


def _constant(value: str) -> Write:
    return lambda _: value


def _plain_apostrophe(text: str) -> str:
    return re.sub("[\u2018\u201b\u0091]", "`", re.sub("[\u2019\u0092]|&apos;", "'", text))


def _without_soft_hyphens(text: str) -> str:
    return text.replace("\u00ad", "") or "-"


def _quote(text: str) -> str:
    return "'" if text == "&apos;" else "".join(_QUOTES.get(char, char) for char in text)


def _dash(text: str) -> str:
    return text if text == "-" or text.startswith("-----") else "--"


def _ampersand(text: str) -> str:
    return text.replace("&amp;", "&")


def _brackets(text: str) -> str:
    return text.replace("(", "-LRB-").replace(")", "-RRB-")


_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_CURRENCIES = {"¢": "cents", "£": "#", "¤": "$", "₠": "$", "€": "$", "\u0080": "$"}
_QUOTES = (
    dict.fromkeys("\u2018\u201b\u2039\u0091", "`")
    | dict.fromkeys("\u2019\u203a\u0092", "'")
    | dict.fromkeys("\u201c\u00ab\u0093", "``")
    | dict.fromkeys("\u201d\u00bb\u0094", "''")
)
_BRACKETS = {"{": "-LCB-", "}": "-RCB-", "[": "-LSB-", "]": "-RSB-", "(": "-LRB-", ")": "-RRB-"}

_REDUCED = f"{_APOS}(?i:[msd]|re|ve|ll)"
_NOT = f"[nN]{_ELISION}[tT]"
_NUMBER = f"(?:{_D}*(?:[.:,\u00ad\u066b\u066c]{_D}+)+|{_D}+)"
_THING_START = f"(?:[dDoOlL]{_ELISION}{_ALNUM})?{_ALNUM}+"
_THING = f"{_THING_START}(?:{_HYPHEN}{_THING_START})*"
_HYPHENATED = f"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_COMPOUND_INITIALS}\\.|[A-Za-z0-9\u00ad]+))+"
_CAPITALS = "[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
_SLASHED_PART = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_SPECIAL = (
    f"(?i:-[RL][RCS]B-|C\\.D\\.s|pro-|anti-|S(?:&|&amp;)P-500|S(?:&|&amp;)Ls|"
    f"Cap{_APOS}n|c{_APOS}est)"
)

CONTRACTIONS = frozenset(["cannot", "gonna", "wanna", "lemme", "gimme", "gotta"])
"""The words of letters alone that are split."""

_RULES: list[tuple[str, Write]] = [
    # Contractions and words.
    ("((?i:can))(?i:not)", _same),
    ("((?i:gon|wan))(?i:na)", _same),
    ("((?i:lem|gim))(?i:me)", _same),
    ("((?i:got))(?i:ta)", _same),
    ("('[tT])(?i:is|was)", _same),
    (f"({_WORD}){_REDUCED}", _without_soft_hyphens),
    (f"([A-Za-z\u00ad]*[A-MO-Za-mo-z]){_NOT}", _without_soft_hyphens),
    (f"({_WORD})", _without_soft_hyphens),
    (f"([A-HJ-XZn]{_ELISION}[{ALPHA}]{{2,}})", _same),
    (f"((?i:{_APOSTROPHE_WORD}))", _same),
    (f"([{ALPHA}]+[aeiouyAEIOUY]{_ELISION}[aeiouA-Z][{ALPHA}]*)", _same),
    (f"([yY]{_APOS})[{ALPHA}]", _same),
    (f"({_REDUCED}|{_NOT})[^A-Za-z]", _plain_apostrophe),
    (r"(')[A-Za-z][^ \t\n\r\u00a0]", _nothing),
    (f"({_REDUCED}|{_NOT})", _plain_apostrophe),
    (f"({_SPECIAL}|{_CAPITALS})", _ampersand),
    (f"({_EMAIL})", _same),
    (f"({_FREE_ABBREVIATION}\\.)(?:(?s:..))?", _same),
    (f"({_THING})", _same),
    (f"({_HYPHENATED})", _without_soft_hyphens),
    (rf"({_SLASHED_PART}(?:\\?/{_SLASHED_PART}){{1,2}})", _same),
    # A period that belongs to the word.
    *(
        (f"({word}\\.)[,;:\u3001]", _without_soft_hyphens)
        for word in (_WORD, _THING, _HYPHENATED, _CAPITALS)
    ),
    (f"((?:[Mm]fg|[Mm]tg|(?i:{_any_of(_BOUND_ABBREVIATIONS)}))\\.)", _same),
    (f"((?i:{_any_of(_NUMBERED_ABBREVIATIONS)})\\.){_GAP}?{_D}", _same),
    (f"({_INITIALS}\\.)", _same),
    (f"([A-Za-z])\\.{_GAP}+(?:{_STARTER}|M(?i:[rs])\\.|{_SGML}){_GAP}", _same),
    (f"({_COMPOUND_INITIALS}\\.)", _same),
    (f"({_COMPOUND_INITIALS}){_GAP}", _same),
    # Numbers, money, dates, telephone numbers.
    (f"([-+]?{_NUMBER})", _without_soft_hyphens),
    (f"({_D}{{1,2}}[-/]{_D}{{1,2}}[-/]{_D}{{2,4}})", _same),
    (f"((?:{_D}{{1,4}}[- \u00a0])?{_D}{{1,4}}(?:\\\\?/|\u2044){_D}{{1,4}})", _same),
    ("([¼½¾\u2153-\u215e])", lambda text: _FRACTIONS.get(text, text)),
    ("([\u207a\u207b\u208a\u208b]?(?:[\u2070¹²³\u2074-\u2079]+|[\u2080-\u2089]+))", _same),
    (r"([A-Z]*\$|#|[CFcf]#|[Cc]\+\+)", _same),
    ("([¢£¤¥\u0080₠€؋฿₤￠￡￥￦])", lambda text: _CURRENCIES.get(text, text)),
    (f"({_PHONE})", _brackets),
    (f"({_APOS}[0-9][0-9]){_GAP}", _same),
    # Addresses, marks of the web, faces.
    (f"((?i:https?)://[^{_NOT_IN_URL}]+{_URL_END})", _same),
    (f"({_HOST})", _same),
    (rf"({_HOST}/[^ \t\n\f\r\"<>|()]+{_URL_END})", _same),
    (f"(@[A-Za-z_][A-Za-z_0-9]*|#{_LETTER}+)", _same),
    (
        f"((?:(?:{_LETTER}|{_D})+\\.)+(?i:{_any_of(_FILE_TYPES)}))(?:{_GAP}|[.?!,])",
        _same,
    ),
    (f"({_SGML})", _same),
    (r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _brackets),
    (
        rf"([\^x=~<>]\.\[\^x=.*?<>\]|{_FACE_EDGE}_{_FACE_EDGE}|\({_FACE_EDGE}[_.]?{_FACE_EDGE}\)"
        rf"|\([\^x=~<>']-[\^x=~<>'`]\))",
        _brackets,
    ),
    # Punctuation.
    (f"([`\u2018-\u201f\u0082\u0084\u0091-\u0094\u2039\u203a\u00ab\u00bb]{{1,2}}|{_APOS})", _quote),
    ("('')", _nothing),
    ('("|&quot;)', _constant("''")),
    ("((?i:&quot;))", _same),
    ("(&(?i:MD|mdash|ndash);|[\u0096\u0097\u2013-\u2015]|-+)", _dash),
    ("((?i:&nbsp;))", _nothing),
    ("((?i:&amp;))", _constant("&")),
    ("(&(?:(?i:HT|TL|UR|LR|QC|QL|QR|odq|cdq)|#[0-9]+);)", _same),
    ("((?i:&lt;))", _constant("<")),
    ("((?i:&gt;))", _constant(">")),
    (r"(\.{3,5}|(?:\.[ \u00a0]){2,4}\.|[\u0085\u2026])", _constant("...")),
    (r"([?!]+|\.|[,;:\u3001]|@+|\#+|_+|<<|>>|\*+|(?:\\\*){1,3})", _same),
    (r"([(){}\[\]])", _BRACKETS.__getitem__),
    (f"([{SYMBOLS}\u2044\u207a\u207b\u208a\u208b\u24b6-\u24cf%<>=+/\\\\|~^&`\u00b4])", _same),
]
_MATCHERS = [(re.compile(pattern).match, write) for pattern, write in _RULES]


def lex(text: str) -> Iterator[str]:
    """The tokens of one line of text, punctuation included, in its own case."""
    end = len(text)
    text += "\n"  # what a token is may depend on what follows it
    at = 0
    while at < end:
        farthest, token_end = at, at + 1
        write: Write = _nothing
        for match_at, candidate in _MATCHERS:
            match = match_at(text, at)
            if match and match.end() > farthest:
                farthest, token_end, write = match.end(), match.end(1), candidate
        yield write(text[at:token_end])
        at = token_end
