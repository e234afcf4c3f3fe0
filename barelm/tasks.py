"""Answers and how they are judged."""

import re
from decimal import Decimal

NUMBER = r"\d[\d,]*(?:\.\d+)?|\.\d+"
MINUS = "\N{MINUS SIGN}"  # U+2212, which models write as often as the hyphen
GSM8K_STOP = ["Question:", "</s>", "<|im_end|>"]  # where an answer ends: lm-eval's


def to_number(sign, digits):
    """The exact value of a sign ("", -, + or MINUS) and digits with commas."""
    value = Decimal(digits.replace(",", ""))
    return -value if sign in ("-", MINUS) else value


def last_number(text):
    """The last number of a text as a Decimal, or None."""
    numbers = re.findall(rf"([-{MINUS}]?)\$?({NUMBER})", text)
    return to_number(*numbers[-1]) if numbers else None


def marked_number(text):
    """The number right behind the first #### that has one, as a Decimal, or None."""
    sign, space = f"([-+{MINUS}]?)", r"[^\S\n]*"
    match = re.search(rf"####{space}{sign}{space}\$?{space}{sign}({NUMBER})", text)
    if match is None:
        return None
    before_dollar, behind_dollar, digits = match.groups()
    return to_number(before_dollar or behind_dollar, digits)


def gsm8k_answer(text):
    """The number that a GSM8K answer gives: the one behind its first ####, or the last one of a
    text without that mark; None where there is none."""
    return marked_number(text) if "####" in text else last_number(text)
