"""Refusals, and disclaimers of being a machine or of what it cannot have read, in English, German, French and Spanish.

A refusal stands at the start, speaks of oneself, and names something that assistants are asked to do. What is quoted is
somebody else's; "I can't stress enough" and "Sorry! is a board game" refuse nothing.
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Literal

from factory.filters.shapes import RowFilter
from factory.rows import Sample, Verdict

WITHIN = 250
"""Characters from the start in which a refusal stands."""

_QUOTED = re.compile(
    r"""[“„«][^“”„»]*(?:[“”»]|$) | "[^"]*(?:"|$) | (?<!\w)'(?:[^'\n]|(?<=\w)'(?=\w))*'(?!\w) | ^>.*$""",
    re.MULTILINE | re.VERBOSE,
)
_OPENING = re.compile(r"'(?<!\w')")
_START = r'^[^\w"]*(?:(?:no|oh|hello|hi|well|hmm)\b[\s,.!–—-]+)?'
_BETWEEN = r"(?:[^.!?\n]{0,80}?|[\s.!,;:—–-]*)"  # the rest of the sentence, or its end

# -- English -----------------------------------------------------------------------------------------------------------

_SORRY = (
    r"(?:(?:i'?m|i am) (?:very |really |so |truly )?(?:sorry|afraid)|sorry|unfortunately|regrettably|i apologi[sz]e"
    r"|(?:my )?apologies|i regret)"
)
_AM_NOT = r"i(?: am|'?m) (?:unable|not able|not allowed|not permitted|not authori[sz]ed|not programmed|not designed)"
_REALLY = r"(?:simply |really |just |honestly )?"
_DECLINE = r"(?: must| have to| will have to|(?:'m| am) going to have to) (?:respectfully |politely )?decline"
_NOT = (
    rf"(?:{_AM_NOT}|i {_REALLY}(?:can(?:not|'?t| not)|won'?t|will not|shouldn'?t|must not|refuse|do not have|don'?t have"
    rf"|do(?: not|n'?t) feel comfortable)|i{_DECLINE})\b"
)
_CAN = (
    rf"(?:{_AM_NOT} to|i {_REALLY}(?:can(?:not|'?t| not)(?: and will not)?|won'?t(?: be able to)?|will not(?: be able to)?"
    r"|shouldn'?t|refuse to))(?: \w+ly| also| even|,? in good conscience,?)?"
)
_MEDIA = r"(?:links?|urls?|pages?|web ?sites?|files?|images?|pictures?|photos?|attachments?|audio|videos?|pdfs?)"
_SERVE = (
    r"(?:help\b(?! (?:but|it|myself|\w+ing)\b)|(?:assist|aid|provide|offer|fulfil+|comply|answer|respond|reply|complete"
    r"|create|write|generate|produce|compose|draft|share|discuss|engage|participate|support|recommend|access|browse"
    r"|verify|translate|summari[sz]e|predict|continue|proceed|accommodate|advise|endorse|promote|encourage|condone"
    r"|facilitate|speculate|disclose|reveal|perform|execute|identify|role-?play|pretend|simulate|impersonate|process"
    r"|express|do (?:that|this|so|it|what)|be of (?:help|assistance)"
    r"|give (?:you |out )?(?:\w+ )?(?:advice|information|instructions|details|that|this|dosing|address)|place orders"
    rf"|(?:open|view|see|read|hear|play|load|visit) (?:the |your |this |that |any |external )?{_MEDIA})\b)"
)
_COMFORTABLE = (
    r"(?:(?:provid|answer|discuss|writ|shar|help|assist|creat|generat|continu|engag|respond|giv|offer|do)ing"
    r"|with (?:that|this|your))"
)
_UNLIKE = (  # what nobody can do for joy, and what friends cannot do on Friday
    r"(?! (?:stress|wait|emphasi[sz]e|imagine|agree more|overstate|believe|complain|say no|help (?:but|it|myself)"
    r"|think of (?:a|any) better|tell you (?:how|what)|make it|come\b|attend|join|be there|stay\b))"
    r"(?![^.!?\n]{0,40}\benough\b)"
)
_MACHINE = (  # "an AI" and "an AI model", not "an AI engineer"
    r"an? (?:(?:responsible |helpful |ethical )?ai|artificial intelligence|machine learning model"
    r"|(?:ai[ -]|large |text-based |ai-based |ai-powered )*language model|ai-(?:powered|based) assistant)"
    r"(?: (?:language )?(?:model|assistant|system|chatbot|program|bot))?"
    r"(?=\s*(?:[,.;:!?()\n—–]|$)| (?:i|so|that|which|created|developed|trained|designed|built|made|programmed|without"
    r"|with|but|my|it)\b| and (?:i|do|don't|not|as|can't|cannot)\b)"
)
_KIND_WORDS = r"(?:while |although )?(?:i (?:understand|appreciate|realise|realize|see|know)|thank(?:s| you)\b)[^.!?\n]{0,120}[,.!]"
_POLICIES = r"(?:content |usage |safety )*(?:guidelines?|polic(?:y|ies)|rules|principles|programming|terms)"
_PLEDGED = r"(?:programmed|designed|trained|built|made|instructed)"
_THAT_IS = r"(?:that(?:'s| is)|this is|it(?:'s| is))"
_CANNOT = [
    rf"{_START}{_SORRY}\b{_BETWEEN}\b{_NOT}{_UNLIKE}",
    rf"{_START}{_CAN} {_SERVE}{_UNLIKE}",
    rf"{_START}i{_DECLINE}\b(?! (?:your|the|his|her|their) (?:invit|offer|job))",
    rf"{_START}(?:i(?:'?m| am) not|i do(?: not|n'?t) feel) comfortable {_COMFORTABLE}",
    rf"{_START}it(?:'s| is) (?:not possible|impossible) for me to\b",
    rf"{_START}(?:{_SORRY}[,.!]? (?:but )?)?{_THAT_IS} not something (?:that )?i (?:can|am able|will)",
    rf"{_START}(?:{_SORRY}[,.!]? (?:but )?)?{_THAT_IS} (?:against|beyond|outside) (?:of )?my\b",
    rf"{_START}{_SORRY}[,.!]? (?:but )?{_THAT_IS} (?:not something|against|beyond|outside)",
    rf"{_START}i (?:do(?: not|n'?t) have|have no|lack) (?:the (?:ability|capability|capacity|means|senses)|personal"
    r"|(?:any |own )?(?:feelings|emotions|beliefs|senses|real-time)|a (?:physical )?body"
    r"|access to (?:your|real-time|live|the (?:internet|web)|current|external|any))",
    rf"{_START}{_KIND_WORDS} (?:but |however,? |unfortunately,? )*{_NOT}{_UNLIKE}",
    rf"{_START}(?:(?:that|this|your|the) (?:\w+ ){{0,2}})?(?:goes against|violates|is against|breaks|conflicts with)"
    rf" (?:my|our) {_POLICIES}",
    rf"{_START}(?:my|our) {_POLICIES} (?:do(?:es)?(?: not|n'?t) (?:allow|permit|let)|prevents?|prohibits?|forbids?)",
    rf"{_START}i(?:'?m| am| was|'ve been| have been) (?:{_PLEDGED} not|not {_PLEDGED}) to\b",
    rf"{_START}(?:being|as) (?:an? |your )?(?:virtual |digital |text-based |responsible )?assistant, i\b",
    rf"{_START}it(?:'s| is| would be| wouldn'?t be| would not be) (?:not |in|un)?(?:appropriate|ethical|right|responsible) (?:for me )to\b",
    rf"{_START}i(?:'?m| am) (?:not capable|incapable) of \w+ing\b",
    rf"{_START}[^.!?\n]{{3,80}}? (?:is|are) (?:not something (?:that )?i (?:can|will|am able)"
    r"|something (?:that )?i (?:can(?:'?t|not)|won'?t))\b",
    rf"{_START}(?:(?:{_SORRY}[,.!]? (?:but )?)?we(?:'re| are) (?:unable|not able)"
    r"|(?:this|the|your) (?:request|prompt|question) (?:cannot|can'?t) be (?:processed|fulfilled|completed|answered)"
    r"|request (?:denied|refused|declined))",
    rf"{_START}i (?:won'?t|will not) be \w+ing (?:that|this|it|any|such)\b",
    rf"{_START}i do(?: not|n'?t) (?:think|believe) i (?:can|should|could) {_SERVE}",
    rf"{_START}i(?:'d| would) (?:rather|prefer) not (?:to )?(?:write|discuss|answer|say|comment|continue|share|do|help|talk)",
    rf"{_START}i can only [^.!?\n]{{3,80}}\bi (?:can(?:'?t|not)|am unable)",
    rf"{_START}i(?:'?m| am) not an? (?:doctor|lawyer|physician|therapist|professional)\b[^.!?\n]{{0,20}}\b(?:can(?:'?t|not)|am unable)",
]
_AS_AN_AI = [
    rf"\b(?:as|being) {_MACHINE}[^.!?\n]{{0,100}}\b(?:i|my|me)\b",
    rf"\bi(?:'?m| am) (?:just |only |merely |simply )?(?:{_MACHINE}|a (?:computer program|chatbot)\b)",
]

# -- German, French, Spanish -------------------------------------------------------------------------------------------

_LEIDER = (
    r"(?:(?:es )?tut mir (?:sehr |wirklich )?leid|entschuldigung|entschuldige|verzeihung|leider|bedauerlicherweise"
    r"|ich bedauere?)"
)
_LEISTEN = (
    r"(?:helfen|weiterhelfen|beantworten|antworten|unterstützen|erfüllen|nachkommen|erstellen|schreiben|verfassen|tun"
    r"|geben|bereitstellen|anbieten|fortfahren|ausführen|ansehen|sehen|öffnen|lesen|stellen|wiedergeben|teilen|abrufen"
    r"|besprechen|bewerten|beurteilen)"
)
_KI = (
    r"(?:eine? )?(?:ki|(?:ki-|großes )?sprachmodell|ki-(?:sprach)?modell|ki-assistent(?:in)?|künstliche intelligenz)\b"
    r"(?![-\w])"
)
_GERMAN = [
    rf"{_START}{_LEIDER}{_BETWEEN}\b(?:(?:kann|darf|werde|möchte) ich|ich (?:kann|darf|werde|möchte|bin))\b"
    r"[^.!?\n]{0,80}\b(?:nicht|nichts|keine?[nr]?)\b(?! (?:genug|kommen|teilnehmen|dabei sein))",
    rf"{_START}(?:ich (?:kann|darf|werde)|(?:das|dabei|dazu|hierzu|hierbei|diese[rsn]? \w+) (?:kann|darf|werde) ich)\b"
    rf"[^.!?\n]{{0,60}}\b(?:nicht|keine?[nr]?)\b[^.!?\n]{{0,30}}\b{_LEISTEN}\b",
    rf"{_START}(?:ich bin|(?:leider|bedauerlicherweise) bin ich) (?:leider )?nicht (?:in der lage|befugt|berechtigt|dazu|fähig)\b",
    rf"{_START}(?:ich habe|leider habe ich) (?:leider )?keinen? (?:zugriff|zugang|eigene|persönliche|gefühle|körper)",
    rf"{_START}ich muss\b[^.!?\n]{{0,40}}\bablehnen\b",
    rf"{_START}es ist mir (?:leider )?nicht (?:möglich|erlaubt|gestattet)\b",
    rf"{_START}ich möchte (?:dazu|darauf|darüber|das|hierzu) (?:lieber )?nicht\b",
    rf"{_START}ich werde\b[^.!?\n]{{0,30}}\bnicht\b[^.!?\n]{{0,10}}\bhelfen\b",
    rf"\bals {_KI}[^.!?\n]{{0,60}}\b(?:ich|mir|mein)\b|\bich \w+ als {_KI}",
    rf"\bich bin (?:nur |lediglich |bloß )?{_KI}",
]
_DESOLE = (
    r"(?:(?:je suis )?(?:vraiment |sincèrement )?(?:désolée?|navrée?)|je regrette|malheureusement|je m'excuse"
    r"|excusez-moi|pardon)"
)
_RENDRE = (
    r"(?:aider|répondre|fournir|donner|créer|écrire|générer|rédiger|faire (?:cela|ça)|accéder|satisfaire|traiter"
    r"|discuter|continuer|ouvrir|consulter|partager|participer|passer|reproduire|divulguer|voir (?:d|l)es images)"
)
_INCAPABLE = r"pas (?:en mesure|capable|autorisée?|habilitée?|conçue?|programmée?)"
_IA = r"(?:ia|intelligence artificielle|(?:grand )?modèle (?:de langage|d'ia)|assistante? (?:ia|virtuel(?:le)?))\b"
_FRENCH = [
    rf"{_START}{_DESOLE}{_BETWEEN}\bje (?:ne (?:peux|puis|saurais|pourrai)\b(?! pas (?:venir|assister|être|insister"
    rf"|attendre))|ne suis {_INCAPABLE}|n'ai pas (?:la |accès|le droit)|dois refuser)",
    rf"{_START}je ne (?:peux|puis) (?:malheureusement )?pas (?:vous |te |t'|y |malheureusement )*{_RENDRE}\b",
    rf"{_START}je ne suis (?:malheureusement )?{_INCAPABLE}",
    rf"{_START}il (?:m'est impossible|ne m'est pas possible)\b",
    rf"{_START}je n'ai pas (?:accès|la (?:capacité|possibilité)|d'(?:opinions?|avis|émotions?)|de (?:corps|sentiments))\b",
    rf"{_START}je (?:dois (?:refuser|décliner)|préfère ne pas (?:répondre|discuter|commenter|écrire))\b",
    rf"\ben tant qu(?:e |'){_IA}[^.!?\n]{{0,60}}\b(?:je\b|j'|mon\b|mes\b)",
    rf"\bje (?:ne )?suis (?:qu'|juste |seulement )?une? {_IA}",
]
_SIENTO = (
    r"(?:lo siento|lo lamento|lamento|disculp[ae](?:me)?|perd[oó]n|perdona|lamentablemente|desafortunadamente"
    r"|desgraciadamente|me temo)"
)
_SERVIR = (
    r"(?:ayudar|responder|proporcionar|ofrecer|dar(?:te|le)?\b|crear|escribir|generar|realizar|cumplir"
    r"|hacer (?:eso|esto)|acceder|asistir(?:te|le)|completar|continuar|participar|brindar|compartir"
    r"|verificar|abrir|procesar|ver (?:imágenes|archivos)|escuchar audio)"
)
_NO_PUEDO = (
    r"no (?:puedo|podr[eé]|me es posible|estoy (?:autorizad|capacitad|en condiciones|programad|diseñad)|soy capaz"
    r"|tengo (?:la capacidad|acceso))"
)
_MODELO = r"(?:una? )?(?:ia|inteligencia artificial|modelo (?:de lenguaje|de ia)|asistente (?:de ia|virtual))\b"
_SPANISH = [
    rf"{_START}{_SIENTO}{_BETWEEN}\b{_NO_PUEDO}(?! (?:ir|asistir|esperar|evitar|acompañar|dejar de)\b)",
    rf"{_START}no (?:puedo|me es posible) (?:\w+mente )?{_SERVIR}",
    rf"{_START}no (?:me es posible|estoy (?:autorizad|capacitad|programad|diseñad|en condiciones)|tengo (?:acceso a|la capacidad))",
    rf"{_START}(?:lamento no poder|debo (?:rechazar|declinar)|prefiero no (?:responder|hablar|comentar|escribir))\b",
    rf"\bcomo {_MODELO}[^.!?\n]{{0,60}}\bno (?:puedo|tengo|soy|estoy|poseo)\b",
    rf"\bsoy (?:solo |sólo )?{_MODELO}",
]

_CUTOFF = [
    r"\bas of my (?:last|latest|most recent|knowledge|current|training)\b",
    r"\bmy (?:knowledge|training)(?: data)?(?: cut-?off)? (?:is|was|only|ends|ended|stops|goes|extends|dates|reaches|comes)\b",
    r"\bmein (?:wissens|kenntnis)stand\b|\bmein wissen (?:reicht|endet)",
    r"\b(?:ma base de connaissances|mes connaissances) (?:s'arrête|date|s'étend|va jusqu)",
    r"\bmi (?:conocimiento|base de conocimientos?) (?:llega|se limita|termina|abarca)|\bmis conocimientos (?:llegan|se limitan)",
]

_OPENS = re.compile(
    rf"{_START}(?:i|sorry|unf|regr|my|apol|th|your|goes|viol|breaks|confl|whi|alth|being|as|we|request|our"
    r"|[^.!?\n]*\bsomething\b)",
    re.IGNORECASE,
)
"""So begins every text that the patterns of "cannot" match."""
_HINTS: dict[str, list[tuple[str, ...]]] = {
    "cannot": [(
        "not", "n't", "cant", "wont", "unable", "refuse", "decline", "denied", "lack", "have no", "against", "violates", "breaks",
        "conflicts", "incapable", "impossible", "beyond", "outside", "prevent", "prohibit", "forbid", "inappropriate", "unethical",
        "assistant, i",
    )],
    "as_an_ai": [
        ("as a", "being a", "i'm", "im ", "i am"),
        ("an ai", "ble ai", "ful ai", "ical ai", "artificial", " model", "ai-", "computer program", "chatbot"),
    ],
    "german": [("ich", "mir", "mein"), ("nicht", "kein", "ki", "sprachmodell", "künstlich", "ablehnen")],
    "french": [("je ", "m'est", "en tant qu"), ("je n", "je dois", "je préfère", "m'est", "suis", "en tant qu")],
    "spanish": [
        ("no ", "debo", "soy "),
        ("no p", "no me", "no es", "no so", "no t", "lamento", "debo", "prefiero", "como ", "soy "),
    ],
    "cutoff": [
        ("my ", "mein ", "connaissances", "conocimiento"),
        ("as of my", "my knowledge", "my training", "mein wissen", "mein kenntnis", "connaissances", "conocimiento"),
    ],
}  # fmt: skip
"""Every text that the patterns match has one of each group: they are tried on few."""


def _compiled(patterns: list[str]) -> list[Callable[[str], re.Match[str] | None]]:
    """Those for the start are tried there alone: a search would try them at each character."""
    first = [pattern for pattern in patterns if pattern.startswith(_START)]
    anywhere = [pattern for pattern in patterns if not pattern.startswith(_START)]
    tries: list[Callable[[str], re.Match[str] | None]] = []
    if first:
        rest = "|".join(pattern.removeprefix(_START) for pattern in first)
        tries.append(re.compile(f"{_START}(?:{rest})", re.IGNORECASE).match)
    if anywhere:
        tries.append(re.compile("|".join(anywhere), re.IGNORECASE).search)
    return tries


_REFUSALS = {
    name: _compiled(patterns)
    for name, patterns in {
        "cannot": _CANNOT,
        "as_an_ai": _AS_AN_AI,
        "german": _GERMAN,
        "french": _FRENCH,
        "spanish": _SPANISH,
        "cutoff": _CUTOFF,
    }.items()
}


def _quotes(text: str) -> bool:
    """Whether something may be quoted."""
    return any(map(text.__contains__, '"“„«>')) or ("'" in text and bool(_OPENING.search(text)))


class NoRefusal(RowFilter):
    """Drops refusals, and disclaimers of being a machine or of a knowledge cutoff."""

    kind: Literal["no_refusal"] = "no_refusal"

    def check(self, sample: Sample) -> Verdict:
        start = unicodedata.normalize("NFC", sample.response.lstrip()[:WITHIN]).replace("’", "'")
        lowered = start.lower()
        likely = [
            name
            for name, groups in _HINTS.items()
            if (name != "cannot" or _OPENS.match(lowered))
            and all(any(map(lowered.__contains__, one)) for one in groups)
        ]
        own = _QUOTED.sub('""', start) if likely and _quotes(start) else start
        for name in likely:
            if found := next(filter(None, (one(own) for one in _REFUSALS[name])), None):
                return self.drop(f"refusal:{name}", evidence=found.group().strip()[:100])
        return self.keep()
