"""What a library or a site wraps around a text: headers, licences and menus, none of it the author's."""

from __future__ import annotations

import re

# Project Gutenberg marks where a book begins and ends; older files end in its small print or in a single line.
_BEGINS = (re.compile(r"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG.*?\*\*\*[ \t]*$", re.M | re.I | re.S),
           re.compile(r"^\*END\*?[ \t]?THE SMALL PRINT!.*?\*END\*[ \t]*$", re.M | re.I | re.S))
_ENDS = (re.compile(r"^\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG", re.M | re.I),
         re.compile(r"^End of (?:the |this )?Project Gutenberg(?:'s|’s)? ", re.M | re.I))
# Credits end at a blank line a few lines on, else with their own: the text of a page may have no blank line at all.
_CREDITS = re.compile(r"\A\s*(?:E-?text (?:prepared|produced) by|(?:This e-?text was )?Produced by"
                      r"|\[?Transcriber.s Notes?:?)(?:(?:[^\n]*\n){1,6}?\n+|[^\n]*(?:\n|\Z))", re.I)
MAX_HEAD = 30_000  # characters in which a beginning is looked for: a book may quote such a line later

_MENU = re.compile(r"^\s*(?:(?:home|about(?: us)?|contact(?: us)?|log ?in|sign (?:in|up)|register|subscribe|menu|search"
                   r"|share|tweet|print|next|previous|skip to (?:main )?content|back to top|privacy policy"
                   r"|terms (?:of (?:use|service)|and conditions)|cookie (?:policy|settings)|all rights reserved\.?"
                   r"|read more|©.*|copyright ©.*)[\s|•·»>]*)+$", re.I)


def strip_boilerplate(text: str) -> str:
    """`text` without a library's header, footer and credits, nor lines that are only a site's menu."""
    for pattern in _BEGINS:
        if match := pattern.search(text, 0, MAX_HEAD):
            text = text[match.end():]
            break
    for pattern in _ENDS:
        if match := pattern.search(text):
            text = text[:match.start()]
            break
    while (shorter := _CREDITS.sub("", text, count=1)) != text:
        text = shorter
    return "\n".join(line for line in text.split("\n") if not line.strip() or not _MENU.match(line)).strip("\n")
