"""tokenizer.json with small vocabularies: all that stands around the vocabulary is as in the hub's files.

Vocabularies are trained on a few sentences. Special tokens stand where the hub has them: in front (sentencepiece,
GPT-NeoX, SmolLM2) or behind the ordinary tokens (Llama 3, Qwen, GPT-2).
"""

import json

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

SENTENCES = (
    "what colour is the sky ? it is blue .", "what colour is grass ? it is green .", "is snow red ? no , white .",
    "who are you ? a small model .", "name a river . the Nile .", "Today Date: 12 Nov 2026\n\nCutting Knowledge Date: ",
    "You are a helpful assistant.", "system\nuser\nassistant\nmodel\n", "## Metadata\n\nReasoning Mode: /no_think",
)  # fmt: skip

# The patterns that cut a text into words: Llama 3's (and SmolLM3's), and Qwen2's, which takes one digit at a time.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLANK = "\u2581"  # sentencepiece's blank


def byte_level(add_prefix_space: bool, trim_offsets: bool, use_regex: bool = True) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets,
            "use_regex": use_regex}  # fmt: skip


def split(pattern: dict, behavior: str) -> dict:
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": False}


def sequence(kind: str, *parts: dict) -> dict:
    return {"type": "Sequence", kind: list(parts)}


def behind(token: str | None, index: int | None) -> dict:
    """The post-processor that puts BOS (None: nothing) before each text."""
    first = [] if token is None else [{"SpecialToken": {"id": token, "type_id": 0}}]
    second = [] if token is None else [{"SpecialToken": {"id": token, "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": [*first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [*first, {"Sequence": {"id": "A", "type_id": 0}}, *second, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {} if token is None else {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def added(index: int, content: str, special: bool = True, normalized: bool = False, rstrip: bool = False) -> dict:
    """An entry of `added_tokens`."""
    return {"id": index, "content": content, "single_word": False, "lstrip": False, "rstrip": rstrip,
            "normalized": normalized, "special": special}  # fmt: skip


def document(vocabulary: list[str], merges: list[list[str]], tokens: list[dict], model: dict, **parts) -> dict:
    """tokenizer.json: `parts` are normalizer, pre_tokenizer, post_processor and decoder."""
    parts = {name: parts.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens, **parts,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            **model, "vocab": {token: i for i, token in enumerate(vocabulary)}, "merges": merges,
        },
    }  # fmt: skip


def train_bytes(digits: str = "", size: int = 96) -> tuple[list[str], list[list[str]]]:
    """(256 bytes and `size` merged tokens, their merges); `digits` is what `WORDS` takes after a digit."""
    words = split({"Regex": WORDS % digits}, "Isolated")
    return _trained(
        pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(words["pattern"]["Regex"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]),
        SENTENCES, 256 + size, sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip


def train_pieces(size: int = 160) -> tuple[list[str], list[list[str]]]:
    """(characters and merged tokens of sentencepiece's kind, their merges)."""
    texts = [BLANK + sentence.replace(" ", BLANK) for sentence in SENTENCES]
    return _trained(pre_tokenizers.Split(BLANK, "merged_with_next"), texts, size, [BLANK])


def _trained(cut, texts, size: int, alphabet: list[str]) -> tuple[list[str], list[list[str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    tokenizer.train_from_iterator(
        list(texts), trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].get), merges


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]

# ---------------------------------------------------------------- the families' files


def llama3(tokens: list[str], bos: str | None) -> dict:
    """Llama 3.x: words by pattern, three digits at a time, whole words before merges, BOS before each text."""
    vocabulary, merges = train_bytes("{1,3}")
    index = {token: len(vocabulary) + i for i, token in enumerate(tokens)}
    post = [byte_level(True, False)] + ([behind(bos, index[bos])] if bos else [])
    return document(
        vocabulary, merges, [added(i, token) for token, i in index.items()], {"ignore_merges": True},
        pre_tokenizer=sequence(
            "pretokenizers", split({"Regex": WORDS % "{1,3}"}, "Isolated"), byte_level(False, True, False)
        ),
        post_processor=sequence("processors", *post), decoder=byte_level(True, True),
    )  # fmt: skip


def qwen(tokens: list[str], plain: tuple[str, ...] = ()) -> dict:
    """Qwen2 to 3: NFC, one digit at a time, no BOS; `plain` tokens are added but not special."""
    vocabulary, merges = train_bytes("")
    at = len(vocabulary)
    return document(
        vocabulary, merges, [added(at + i, token, token not in plain) for i, token in enumerate(tokens)],
        {"continuing_subword_prefix": "", "end_of_word_suffix": ""},
        normalizer={"type": "NFC"},
        pre_tokenizer=sequence(
            "pretokenizers", split({"Regex": WORDS % ""}, "Isolated"), byte_level(False, False, False)
        ),
        post_processor=byte_level(False, False, False), decoder=byte_level(False, False, False),
    )  # fmt: skip


def gpt2() -> dict:
    """GPT-2: one special token, at the end."""
    vocabulary, merges = train_bytes("+")
    token = added(len(vocabulary), "<|endoftext|>", normalized=True)
    return document(
        [*vocabulary, "<|endoftext|>"], merges, [token], {"continuing_subword_prefix": "", "end_of_word_suffix": ""},
        pre_tokenizer=byte_level(False, True), post_processor=byte_level(True, False), decoder=byte_level(True, True),
    )  # fmt: skip


def smollm2(tokens: list[str]) -> dict:
    """SmolLM2: GPT-2's pipeline behind one that takes digits one by one; special tokens come first."""
    vocabulary, merges = train_bytes("+")
    digits = {"type": "Digits", "individual_digits": True}
    return document(
        [*tokens, *vocabulary], merges, [added(i, token) for i, token in enumerate(tokens)], {},
        pre_tokenizer=sequence("pretokenizers", digits, byte_level(False, True)), decoder=byte_level(True, True),
    )  # fmt: skip


def neox(tokens: list[str], blanks: int) -> dict:
    """GPT-NeoX and Pythia: NFC; runs of blanks, of 24 to 2 there `blanks` of them here, stand last."""
    vocabulary, merges = train_bytes("+")
    vocabulary = [*tokens, *vocabulary]
    runs = [added(len(vocabulary) + i, " " * (blanks + 1 - i), False, True) for i in range(blanks)]
    return document(
        vocabulary, merges, [added(i, token) for i, token in enumerate(tokens)] + runs,
        {"continuing_subword_prefix": "", "end_of_word_suffix": ""},
        normalizer={"type": "NFC"}, pre_tokenizer=byte_level(False, True), post_processor=byte_level(False, True),
        decoder=byte_level(False, True),
    )  # fmt: skip


def gemma(first: list[str], last: tuple[str, ...] = ()) -> dict:
    """Gemma: blanks are replaced and none is put before a text; runs of newlines and blanks are added, not special.

    `last` stand behind the vocabulary, as Gemma 3's `<image_soft_token>`.
    """
    pieces, merges = train_pieces()
    runs = ["\n", "\n\n", "\n\n\n", BLANK * 2, BLANK * 3]
    vocabulary = [*first, *runs, *BYTES, *[piece for piece in pieces if piece not in runs]]
    merges = [merge for merge in merges if "".join(merge) not in runs]
    tokens = [added(i, token, token not in runs) for i, token in enumerate([*first, *runs])]
    tokens += [added(len(vocabulary) + i, token) for i, token in enumerate(last)]
    return document(
        vocabulary, merges, tokens, {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
        normalizer={"type": "Replace", "pattern": {"String": " "}, "content": BLANK},
        pre_tokenizer=split({"String": " "}, "MergedWithPrevious"),
        post_processor=behind("<bos>", first.index("<bos>")),
        decoder=sequence("decoders", REPLACED, {"type": "ByteFallback"}, {"type": "Fuse"}),
    )  # fmt: skip


REPLACED = {"type": "Replace", "pattern": {"String": BLANK}, "content": " "}
STRIPPED = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def sentencepiece(
    first: list[str],
    behind_all: list[dict] = (),
    bos: bool = True,
    metaspace: bool = False,
    plain: dict[str, dict] | None = None,
) -> dict:
    """Llama 2's kind: a blank before each text, bytes for what is unknown.

    The blank comes from a normalizer, which puts one behind each added token too, or with `metaspace` from a
    pre-tokenizer, before the text's start only (transformers' conversion with `legacy: false`). `behind_all` are added
    tokens without their ids; `plain` changes entries of the first tokens.
    """
    pieces, merges = train_pieces()
    vocabulary = [*first, *BYTES, *pieces]
    tokens = [added(i, token) | (plain or {}).get(token, {}) for i, token in enumerate(first)]
    tokens += [token | {"id": len(vocabulary) + i} for i, token in enumerate(behind_all)]
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    cut = {"type": "Metaspace", "replacement": BLANK, "prepend_scheme": "first", "split": False}
    return document(
        vocabulary, merges, tokens, {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
        normalizer=None if metaspace else sequence("normalizers", {"type": "Prepend", "prepend": BLANK}, blanks),
        pre_tokenizer=cut if metaspace else None,
        post_processor=behind("<s>", 1) if bos else behind(None, None),
        decoder=sequence("decoders", REPLACED, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIPPED),
    )  # fmt: skip
