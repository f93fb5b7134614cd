"""From tokens to text: the same bytes whether a text comes whole, in a stream or as names beside log-probabilities.

token ─► piece (bytes) ─► characters, as they are completed ─► clean-up ─► stop strings ─► what is told
"""

from fastdecode.text.detokenize.output_text import OutputText
from fastdecode.text.detokenize.pieces import TokenPiece, Vocabulary, bytes_name, read_vocabulary, text_in_window
from fastdecode.text.detokenize.stop_strings import StopMatch, StopStrings
from fastdecode.text.detokenize.streams import CleanStream, PieceStream, Stream, WindowStream

__all__ = [
    "CleanStream",
    "OutputText",
    "PieceStream",
    "StopMatch",
    "StopStrings",
    "Stream",
    "TokenPiece",
    "Vocabulary",
    "WindowStream",
    "bytes_name",
    "read_vocabulary",
    "text_in_window",
]
