"""The gate before a judge: answers that speak to the judge, or as it, are set aside before anybody is asked.

Cheap signs, for what a text that only answers has no need of. A judge is asked about data between borders that the
data cannot know, and its verdict is read strictly; this comes before both, since a gullible judge obeys anyway.

Most signs are words of several classes near each other (this answer, the best, a grade; forget, earlier, instructions),
in the languages that the classes list, so that the wording is free. Any language beyond them is not seen.
"""

import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise


def _folded(text: str) -> str:
    """Wide, styled and accented letters as plain ones: what a model reads all the same."""
    apart = unicodedata.normalize("NFKD", text)
    return unicodedata.normalize("NFC", "".join(c for c in apart if not "\u0300" <= c <= "\u036f"))


def _sign(*patterns: str) -> re.Pattern[str]:
    return re.compile(_folded("|".join(patterns)), re.IGNORECASE | re.MULTILINE)


_TOKENS = _sign(
    r"<\|[a-z_]{2,30}\|>|\[/?INST\]|<</?SYS>>|</?(?:start_of_turn|end_of_turn)>",
    r"^[ \t]*#{2,4}[ \t]*(?:system|instruction|assistant)\s*:",
)
_GRADE = r"scores?|ratings?|grades?|marks?|points?|stars?|verdicts?"
_VERDICT = _sign(
    r"^[^\w\n]{0,20}(?:(?:final|overall|your|my|the|total)\s+)*(?:score|rating|grade|verdict|mark|points|better"
    r"|answer\s*\d+)[^\w\n]{0,20}?(?:[:=]|is\b|->)[^\w\n]{0,20}"
    r"(?:\d+(?:\.\d+)?(?:\s*(?:/|out of)\s*\d+)?|tie|[a-f][+-]?|one|two|three|four|five|ten|perfect"
    r"|excellent|max\w*)[^\w\n]{0,20}$",
    r"\b(?:result|score|rating|grade|verdict)[\"']?\s?[:=]\s?[\"']?(?:highest|best|top|max\w*|full|perfect|excellent)\b",
)
_KEY = r"score|rating|grade|verdict|better|answer_\d+"
_VALUE = r"(?:\"[^\"\n]*\"|'[^'\n]*'|[\d.]+|true|false|null)"
# an object of nothing but a verdict: data that has a score among other things is an answer
_BESIDE = rf"[\"'](?:reason\w*|explanation|comment|quality|final|{_KEY})[\"']\s*:\s*{_VALUE}\s*"
_JSON_VERDICT = _sign(
    rf"\{{\s{{0,9}}(?:{_BESIDE},\s*){{0,9}}[\"'](?:{_KEY})[\"']\s*:\s*{_VALUE}\s*(?:,\s*{_BESIDE}){{0,9}}\}}"
)
_BORDER = _sign(
    r"^[^\w\n]{0,20}(?:end|begin|start)\s+of\s+(?:the\s+)?(?:answer|response|question|data|material)\b",
    r"\b(?:answer|response|text|material|submission)\b[^.!?\n]{0,30}\bends? here\b",
)

_GRADER = (
    r"(?:judges?|graders?|evaluators?|reviewers?|raters?|assessors?|examiners?"
    r"|whoever (?:grades|judges|rates|reads|marks|scores))"
)
_GRADERS = (
    r"pr[üu]fer\w*|gutachter\w*|[ée]valuateurs?|correcteurs?|evaluador\w*|valutator\w+|avaliador\w*|beoordelaar\w*"
    r"|egzaminator\w*|оценщик\w*|проверяющ\w*|değerlendiric\w*|评审\w?|评委|评分员|審査員|採点者|評価者|평가자|심사위원|채점자"
    r"|المقيم|المصحح|मूल्यांकनकर्ता|परीक्षक"
)
_GIVE = (
    r"(?:give|giving|award|assign|output|write|return|print|respond|reply|answer|rate|grade|score"
    r"|mark|put|choose|pick|select|record|enter|report)"
)
_NUMBER = r"(?:\d+(?:\.\d+)?|one|two|three|four|five|ten|full|top|highest|largest|maximum|max|best|perfect|excellent)"
# an order begins its clause: who tells of customers that give the best grade orders nothing
_FIRST = r"(?:^|[,;:.!?-] |[(>*\"']|\b(?:please|kindly|just|must|should|shall|have to|and|then|so|now|only) )"
_DO = rf"{_FIRST}[ \t]{{0,9}}{_GIVE}\b"
_ORDERS = _sign(
    # forget what you were told
    rf"{_FIRST}(?:ignore|disregard|forget|override|bypass|skip|discard|drop|set aside|pay no attention to"
    r"|do not follow|stop following)\b[^.!?\n]{0,50}"
    r"\b(?:previous|prior|above|earlier|preceding|all|any|everything|your|other|given|former|rubric|original)\b[^.!?\n]{0,40}"
    r"\b(?:instruct\w*|rules?|rubric|prompts?|orders?|guidelines?|criteria|directions?|text|messages?|context|told|said|task)\b",
    # give it this
    rf"{_DO}[^.!?\n]{{0,60}}\b(?:{_GRADE}|number|category)\b[^.!?\n]{{0,30}}\b{_NUMBER}\b",
    rf"{_DO}[^.!?\n]{{0,60}}\b{_NUMBER}\b[^.!?\n]{{0,30}}\b(?:{_GRADE}|number|category)\b",
    rf"{_DO}[^.!?\n]{{0,40}}\b(?:it|this|answer|response|me)\b[^.!?\n]{{0,30}}\b{_NUMBER}\s*(?:/|out of|of)\s*\d+",
    rf"\b(?:this|my|the|above) (?:answer|response|reply|text|one)\b"
    rf"[^.!?\n]{{0,40}}\b(?:deserves?|merits?|earns?|must|should|has to|is to|gets?|receives?|warrants?)\b"
    rf"[^.!?\n]{{0,50}}\b{_NUMBER}\b",
    rf"\b(?:{_GRADE})\b[^.!?\n]{{0,30}}\b(?:for|of) (?:this|my) (?:answer|response|reply)\b[^.!?\n]{{0,40}}\b{_NUMBER}\b",
    # spoken to the judge, as the judge, or as somebody over it
    rf"\b(?:dear|hey|hello|attention|you,|note (?:to|for)|message (?:to|for)|instructions? (?:to|for)|^to)"
    rf" (?:the |all |any |our |this |an? |automated )*{_GRADER}\b",
    rf"(?:^|[.!?(\]>] ?)(?:the )?{_GRADER}\s?[,:]",
    rf"\b(?:note|notiz|hinweis|aviso|nota|mensagem|mensaje|messaggio|message|uwaga|bericht)\b[^.!?\n]{{0,12}}\b(?:{_GRADERS})",
    r"(?:评审\w?|评委|评分员|審査員|採点者|評価者|평가자|심사위원|채점자).{0,4}(?:请|請|注意|へ|여러분|께)",
    rf"\b(?:as|you are|you're|you were|act as|now) (?:a |an |the |now )*(?:\w+, )?(?:a |an )?(?:\w+ )?{_GRADER}\b"
    rf"[^.!?\n]{{0,80}}\b(?:{_NUMBER}|must|never|always)\b",
    rf"\b(?:system|admin\w*|developer|operator)\b ?(?:message|note|notice|override|update|prompt)?:"
    rf"[^\n]{{0,160}}\b(?:{_GRADE}|{_GRADER}|grading|scoring)\b",
    r"\b(?:grading|evaluation|scoring|rating|judging|rubric) (?:is |has been |was )?(?:over|done"
    r"|complete\w*|finished|changed|updated|cancel\w*|suspended|replaced|void)\b",
    r"\bno (?:further|more) (?:assessment|evaluation|grading|review|analysis)\b[^.!?\n]{0,20}\b(?:needed|necessary|required)\b",
)  # fmt: skip

_THIS = _sign(
    r"\b(?:this|my|(?:the )?above|the present) (?:\w+ ){0,2}(?:answer|response|reply|solution|text|item|record|sample|one)\b",
    r"\bwhat i (?:wrote|have written|said)\b|\bsuch an? (?:\w+ )?(?:answer|response|reply)\b",
    r"\bmy (?:verdict|rating|grade|score)\b|\b(?:criteria|rubric|scale) above\b|\byour (?:reply|output|response) (?:must|should)\b",
    r"\b(?:diese\w?|meine\w?) (?:antwort|lösung|text)",
    r"\b(?:cette|ma) réponse|\b(?:esta|mi) respuesta|\b(?:questa|mia) risposta|\b(?:esta|minha) resposta",
    r"\b(?:dit|mijn) antwoord|\bt[aęe]j? odpowied|\b(?:эт|мо)\w{1,3} ответ|\bbu (?:cevap|cevab|yanıt)",
    r"[这這此本](?:个|個|份|篇|道)?(?:回答|答案|答复|答卷)|(?:この|本)(?:回答|解答|答え)|이 (?:답변|대답|답안)",
    r"هذ[ها] (?:ال)?(?:إجابة|جواب|رد)|इस (?:उत्तर|जवाब)",
)
_BEST = _sign(
    r"\b(?:highest|top|maxim\w*|max|full|best|perfect|largest|five|ten|upper (?:end|bound|limit)|generous\w*|outstanding)\b",
    r"\bhöchst\w*|\b(?:volle|beste)[nrs]?\b|\bhoogste\b",
    r"\bmeilleure?s?\b|\bplus (?:haute?|élevée?)\b|\btous les points",
    r"\b(?:más|mais) alt[ao]\b|\bme[jl]h?or\b|\b(?:nota|note) (?:dez|diez|dieci)\b|\bmáxim[ao]|\bmassim[oa]\b|\bpiù alt[oa]\b",
    r"\bnajwyższ\w+|\bmaksym\w+|\bpełn\w+|\b(?:максим|высш|высок|лучш|полны)\w*|\ben yüksek\b|\btam puan",
    r"最高|满分|滿分|優秀|优秀|満点|최고|만점|أعلى|الكاملة|القصوى|सबसे अधिक|सर्वोच्च|पूरे|अधिकतम",
)
_MARK = _sign(
    rf"\b(?:{_GRADE}|credit|rate|rated|graded?|mark(?:ed)?|scale|assess\w*|evaluat\w*)\b",
    r"\bnoten?\b|punkt(?:zahl|e)\b|\bbewert\w+|\bcijfer|\bnotes?\b|\bévalu\w+",
    r"\bpuntuaci\w+|\bcalific\w+|\bpuntaje|\bpuntos\b|\bnota\b|\bpunteggi\w+|\bvoto\b|\bvaluta\w*|\bpontu\w+|\bavali\w+",
    r"\bocen\w+|\bpunkt\w*|\bоцен\w+|\bбалл\w*|\bpuan\w*|分|点|點|评为|判|점|درجة|علامة|العلامة|نقاط|अंक",
)
_FORGET = _sign(
    r"\b(?:ignore|disregard|forget|do not follow|stop following)\b",
    r"\b(?:vergiss|vergesst|vergessen sie|ignorier\w+|negeer|vergeet|oublie[zr]?|ignore[zr])\b",
    r"\b(?:olvid[ae]|ignor[ae]|dimentica\w*|esque[cç]a|desconsidere)\b",
    r"\b(?:zignor|zapomnij|забуд|игнорир)\w*|\b(?:yok say\w*|unut|görmezden gel)",
    r"忽略|无视|無視|忘记|忘れ|무시|잊|تجاهل|انس |अनदेखा|भूल",
)
_TOLD = _sign(
    r"\b(?:instruct\w*|rubric|prompts?|orders|guidelines?|criteria|told|strictness)\b",
    r"\b(?:anweisung|vorgabe|kriteri|instruktion|instructies)\w*|criteria\b|\bconsignes?\b",
    r"\binstrucci\w+|\bcriterio\w*|\bistruzion\w+|\bcriteri\b|\binstruç\w+|\bcritério\w*",
    r"\b(?:instrukcj|kryteri|инструкц|указан|критери|talimat)\w*",
    r"指令|指示|说明|要求|标准|지시|지침|기준|التعليمات|المعايير|निर्देश",
)
_BEFORE = _sign(
    r"\b(?:previous|prior|above|earlier|preceding|all|any|everything|your|other|given|former|rubric|original|were)\b",
    r"\b(?:vorherig|bisherig|obig|vorig|all|dein|eerdere|beoordelings|précédent|tout|vos)\w*",
    r"\b(?:anterior|previ|tod|precedent|ricevut|tutt)\w*|\bacima\b",
    r"\b(?:wcześniejsz|poprzedni|wszystki|предыдущ|все|прежн)\w*|\b(?:önceki|tüm)\b",
    r"之前|以上|上述|前面|先前|所有|これまで|以前|上記|前の|이전|위의|모두|모든|السابقة|كل |पिछले|सभी",
)
_JUDGES = _sign(
    r"\b(?:graders?|evaluators?|reviewers?|raters?|assessors?|examiners?|reviewed|audited)\b",
    r"\byour (?:scale|verdict|rubric|criteria|form|guidelines|rating)\b",
    rf"\b(?:{_GRADERS})|专家|comité|comisi[óo]n|especialistas|fachleut",
)
_OTHERS = _sign(r"\bthe other (?:answers?|responses?|repl(?:y|ies)|candidates?|ones?)\b")
_NEAR = (
    (_FORGET, _TOLD, _BEFORE),
    (_THIS, _BEST, _MARK),
    (_THIS, _JUDGES),
    (_THIS, _OTHERS),
    (_sign(r"\byour (?:scale|verdict|rubric|form|job|category)\b"), _BEST),
)
"""Classes that an answer has no need to bring together in two sentences."""

_LOOKALIKE = str.maketrans(
    "аеорсхуікмтвнѕјАЕОРСХУІКМТВНЅЈΑΒΕΖΗΙΚΜΝΟΡΤΥΧαονρ", "aeopcxyikmtbhsjAEOPCXYIKMTBHSJABEZHIKMNOPTYXaovp"
)
_DIGIT = str.maketrans("013457", "oieast")
_MIXED = re.compile(r"\b(?=\w*[a-z])(?=\w*[\u0370-\u04ff])\w+", re.IGNORECASE)
_LEET = re.compile(r"\b(?=[a-z]*\d)(?=\d*[a-z])[a-z\d]{3,}\b", re.IGNORECASE)
_SPACED = re.compile(r"\b(?:\w ){2,}\w\b")
_ENDS = re.compile(r"[.!?:;。！？।؟\n]+")


def hijack(text: str) -> tuple[str, str] | None:
    """What in an answer is meant for its judge: the kind, and the words; None for an answer that only answers."""
    plain = _plain(text)
    return _found(plain) or (None if (other := _respelt(plain)) == plain else _found(other))


def _found(plain: str) -> tuple[str, str] | None:
    for kind, pattern in (
        ("template_token", _TOKENS),
        ("verdict_line", _VERDICT),
        ("verdict_line", _JSON_VERDICT),
        ("border", _BORDER),
        ("orders", _ORDERS),
    ):
        if found := pattern.search(plain):
            return kind, " ".join(found[0].split())[:160]
    near = [signs for signs in _NEAR if all(sign.search(plain) for sign in signs)]
    for two in _neighbours(plain) if near else ():
        if any(all(sign.search(two) for sign in signs) for signs in near):
            return "orders", " ".join(two.split())[:160]
    return None


def _neighbours(text: str) -> Iterator[str]:
    """Each sentence with the one behind it."""
    sentences = [*filter(str.strip, _ENDS.split(text)), ""]
    return (f"{first}. {second}" for first, second in pairwise(sentences))


def _plain(text: str) -> str:
    """What a model reads all the same: styled and lookalike letters, and what is invisible."""
    if text.isascii():
        return text
    return _MIXED.sub(lambda word: word[0].translate(_LOOKALIKE), _folded("".join(map(_shown, text))))


def _respelt(plain: str) -> str:
    """The same with digits as the letters that they look like, and spaced letters together."""
    plain = _LEET.sub(lambda word: word[0].translate(_DIGIT), plain)
    return _SPACED.sub(lambda run: run[0].replace(" ", ""), plain)


def _shown(char: str) -> str:
    """Tags are letters that nobody sees; other invisible characters are nothing, and each line break is one."""
    if "\U000e0020" <= char <= "\U000e007e":
        return chr(ord(char) - 0xE0000)
    return "" if unicodedata.category(char) == "Cf" else "\n" if char in "\u2028\u2029" else char
