"""Words that make a statement no plain one."""

from __future__ import annotations

import re

_NEGATIONS = r"not|never|no|none|nor|neither|cannot|without|nothing|nobody|isnt|nope|nah|untrue"
_ALTERNATIVES = (
    r"either|or|except|unless|if|whether|versus|vs|between|other(?:wise)?|another|else|alternatively"
    r"|alternately|any(?:thing|one)?|everything|something|whatever|whichever|both"
)
_HEDGES = (
    r"suppos\w*|assum\w*|maybe|perhaps|possib\w+|probabl\w+|might|(?-i:may)|could|doubt\w*"
    r"|dubious|unlikely|impossible|uncertain\w*|unsure|unclear|unknown|guess\w*|seem\w*|ish"
    r"|questionable|allegedly|hardly|barely|scarcely|hmm+|unconfirmed|unverified"
)
_VERDICTS = (
    r"wrong\w*|incorrect\w*|false\w*|invalid|mistak\w+|erroneous\w*|errors?|inaccurate\w*"
    r"|reject\w*|refut\w*|den(?:y|ied|ies)|fake|bogus|retract\w*|disregard|ignore|scratch|strike|fails"
    r"|opposite|contrary|reversed?|conversely|correction"
)
_TURNS = r"rather|instead|but|wait|actually|however|although|though|oops|sorry"

DOUBT = re.compile(
    rf"(?<![\w'\\])(?:{_NEGATIONS}|{_ALTERNATIVES}|{_HEDGES}|{_VERDICTS}|{_TURNS})\b|n't\b",
    re.IGNORECASE,
)
"""Negations, conditions, alternatives, hedges, verdicts and turns."""
DOUBT_OF_A_NO = re.compile(
    rf"(?<![\w'\\])(?:{_ALTERNATIVES}|{_HEDGES}|{_VERDICTS}|{_TURNS}|untrue|nor)\b", re.IGNORECASE
)
"""The same where the answer itself is a no, for which negations are reasons."""
