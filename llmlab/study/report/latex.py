"""Text for LaTeX, in which data cannot become a command. Compiles with pdfLaTeX, XeLaTeX and LuaLaTeX alike."""

import unicodedata

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"{\char34}",  # \textquotedbl is not in the default encoding; a bare one is a command under babel
    "`": r"\textasciigrave{}",
    "-": "-{}",  # two in a row would become a dash
    "'": "'{}",
    ",": ",{}",
    "?": "?{}",
    "!": "!{}",
    "\N{MINUS SIGN}": "$-$",
    "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{INFINITY}": r"$\infty$",
    "\N{LESS-THAN OR EQUAL TO}": r"$\leq$",
    "\N{GREATER-THAN OR EQUAL TO}": r"$\geq$",
    "\N{RIGHTWARDS ARROW}": r"$\to$",
    "\N{EN DASH}": "--",
    "\N{EM DASH}": "---",
    "\N{HORIZONTAL ELLIPSIS}": r"\dots{}",
    "\N{MIDDLE DOT}": r"$\cdot$",
    "\N{DEGREE SIGN}": r"$^\circ$",
    "\N{MICRO SIGN}": r"$\mu$",
    "\N{NO-BREAK SPACE}": "~",
}
_GREEK = {
    chr(code): name
    for code, name in {
        0x3B1: "alpha", 0x3B2: "beta", 0x3B3: "gamma", 0x3B4: "delta", 0x3B5: "varepsilon", 0x3B6: "zeta", 0x3B7: "eta",
        0x3B8: "theta", 0x3B9: "iota", 0x3BA: "kappa", 0x3BB: "lambda", 0x3BC: "mu", 0x3BD: "nu", 0x3BE: "xi",
        0x3C0: "pi", 0x3C1: "rho", 0x3C3: "sigma", 0x3C4: "tau", 0x3C5: "upsilon", 0x3C6: "varphi", 0x3C7: "chi",
        0x3C8: "psi", 0x3C9: "omega", 0x393: "Gamma", 0x394: "Delta", 0x398: "Theta", 0x39B: "Lambda", 0x39E: "Xi",
        0x3A0: "Pi", 0x3A3: "Sigma", 0x3A6: "Phi", 0x3A8: "Psi", 0x3A9: "Omega",
    }.items()
}  # fmt: skip


def escape(text: str) -> str:
    """A text on one line, that shows as it is; characters that LaTeX has no glyph for become their code, U+4E2D."""
    return "".join(map(_character, " ".join(text.split())))


def math(shown: str) -> str:
    """A number as `numbers` shows it, in math mode: its minus and signs are LaTeX's."""
    return f"${shown.replace(chr(0x2212), '-').replace(chr(0x221E), chr(92) + 'infty ')}$"


def _character(char: str) -> str:
    if char in _SPECIAL:
        return _SPECIAL[char]
    if char.isascii():
        return char if char.isprintable() else ""
    if char in _GREEK:
        return rf"$\{_GREEK[char]}$"
    base, *marks = unicodedata.normalize("NFD", char)
    accents = {"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0308": '"', "\u0327": "c "}
    if base.isascii() and base.isalpha() and len(marks) == 1 and marks[0] in accents:
        return rf"\{accents[marks[0]]}{{{base}}}"
    return rf"\texttt{{U+{ord(char):04X}}}"
