"""Characters that end a sentence, and those that close it, in scripts of the world."""

from __future__ import annotations

# Full stops, question and exclamation marks that end a sentence whatever follows, a space or not: of Chinese and Japanese; of
# Hindi and its neighbours; of Arabic and Urdu; of Amharic, Burmese, Khmer and Armenian. Latin ones need a look at what follows.
STOPS = "\u3002\uff61\uff01\uff1f\u203c\u2047\u2048\u2049\u0964\u0965\u061f\u06d4\u1362\u1367\u104b\u17d4\u0589"
# Ends a sentence in Chinese and Japanese texts, but after a digit it may be a decimal point.
WIDE_FULL_STOP = "\uff0e"
# Quotation marks and brackets that belong to the sentence before them.
CLOSERS = "\"')]\u201d\u2019\u00bb\u300d\u300f\uff09\u3011\u300b\u3009"
