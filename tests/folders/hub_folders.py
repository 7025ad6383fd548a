"""Tiny copies of well-known hub folders: python tests/folders/hub_folders.py DIR [NAME ...] writes them.

What is as on the hub: which files there are; the entries of config.json (as transformers 4 wrote it), but sizes; those
of generation_config.json; the pipeline of tokenizer.json, the order of its special tokens and their flags; the
tokenizer's class and entries; where the chat template stands; the weights' dtype and names; how many rows the embedding
has beyond the tokenizer, or the other way round. What is not: weights are random, sizes and vocabularies small, and
templates are our own words for what the models' templates do (`hub_templates.py`).

Entries were read from public copies of the files and from transformers' conversion scripts; two are from memory: that
SmolLM3's tokenizer puts no BOS before a text, and the number of Mistral's control tokens is cut to eight.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hub_templates as templates
import hub_tokenizers as pipelines

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
POSITIONS = 512
SCALE = 0.3  # deviation of the random weights: far from uniform logits, so that greedy answers do not hang on rounding
PLACES = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a hub folder holds. Token entries name tokens, and become their ids."""

    config: dict[str, Any]
    tokenizer: Callable[[], dict]  # tokenizer.json
    entries: dict[str, Any]  # tokenizer_config.json, without added_tokens_decoder and chat_template
    generation: dict[str, Any] | None = None
    template: str | None = None
    template_file: bool = False  # chat_template.jinja in place of an entry
    turn_end: str | None = None  # what ends the template's assistant turn
    system: bool = True  # whether the template takes a system turn
    decoder_listed: bool = True  # whether added_tokens_decoder is there
    special_map: bool = True  # whether special_tokens_map.json is there
    vocabulary_files: bool = False  # vocab.json and merges.txt beside tokenizer.json
    rows: int = 0  # rows of the embedding beyond the tokenizer's ids, or (negative) ids without a row
    rename: Callable[[dict], dict] | None = None  # tensors of transformers to those of the hub's file


def _plain(tokens: list[str], first: int, count: int, name: str) -> list[str]:
    return [*tokens, *(f"<|{name}_{i}|>" for i in range(first, first + count))]


LLAMA3_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_3|>",
]  # fmt: skip
LLAMA3_CONFIG = dict(
    architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id="<|begin_of_text|>",
    eos_token_id="<|end_of_text|>", head_dim=8, hidden_act="silu", initializer_range=0.02,
    max_position_embeddings=POSITIONS, mlp_bias=False, model_type="llama", pretraining_tp=1, rms_norm_eps=1e-05,
    rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                  "original_max_position_embeddings": 32, "rope_type": "llama3"},
    rope_theta=500000.0, tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.45.0.dev0",
    use_cache=True, **SIZES,
)  # fmt: skip
LLAMA3_ENTRIES = dict(
    bos_token="<|begin_of_text|>", clean_up_tokenization_spaces=True, eos_token="<|end_of_text|>",
    model_input_names=["input_ids", "attention_mask"], model_max_length=131072,
    tokenizer_class="PreTrainedTokenizerFast",
)  # fmt: skip
LLAMA3_STOPS = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
LLAMA32 = Folder(
    config=LLAMA3_CONFIG, entries=LLAMA3_ENTRIES, tokenizer=lambda: pipelines.llama3(LLAMA3_TOKENS, LLAMA3_TOKENS[0]),
    generation=dict(_from_model_config=True, bos_token_id="<|begin_of_text|>", do_sample=True,
                    eos_token_id="<|end_of_text|>", temperature=0.6, top_p=0.9),
)  # fmt: skip

QWEN_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
              "<|repo_name|>", "<|file_sep|>")  # fmt: skip
QWEN3_PLAIN = (*QWEN_PLAIN, "<tool_response>", "</tool_response>", "<think>", "</think>")
QWEN_CONFIG = dict(
    architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id="<|endoftext|>",
    eos_token_id="<|endoftext|>", hidden_act="silu", initializer_range=0.02, max_position_embeddings=POSITIONS,
    max_window_layers=2,
    model_type="qwen2", rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=POSITIONS, tie_word_embeddings=True,
    torch_dtype="bfloat16", transformers_version="4.40.1", use_cache=True, use_mrope=False, use_sliding_window=False,
    **SIZES,
)  # fmt: skip
QWEN_ENTRIES = dict(
    add_bos_token=False, add_prefix_space=False, additional_special_tokens=QWEN_TOKENS[1:], bos_token=None,
    clean_up_tokenization_spaces=False, eos_token="<|endoftext|>", errors="replace", model_max_length=32768,
    pad_token="<|endoftext|>", split_special_tokens=False, tokenizer_class="Qwen2Tokenizer", unk_token=None,
)  # fmt: skip
QWEN25 = Folder(
    config=QWEN_CONFIG, tokenizer=lambda: pipelines.qwen([*QWEN_TOKENS, *QWEN_PLAIN], QWEN_PLAIN), entries=QWEN_ENTRIES,
    generation=dict(bos_token_id="<|endoftext|>", do_sample=False, eos_token_id="<|endoftext|>", max_new_tokens=2048),
    template=templates.QWEN2_5.replace("DEFAULT", "You are a helpful assistant."), turn_end="<|im_end|>", rows=11,
    special_map=False, vocabulary_files=True,
)  # fmt: skip
QWEN_CHAT = dict(bos_token_id="<|endoftext|>", do_sample=True, eos_token_id=["<|im_end|>", "<|endoftext|>"],
                 pad_token_id="<|endoftext|>", temperature=0.7, top_k=20, top_p=0.8)  # fmt: skip

GEMMA_FIRST = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "[multimodal]", "<unused0>", "<start_of_turn>",
               "<end_of_turn>"]  # fmt: skip
GEMMA_CONFIG = dict(
    architectures=["Gemma2ForCausalLM"], attention_bias=False, attention_dropout=0.0, attn_logit_softcapping=50.0,
    bos_token_id="<bos>", cache_implementation="hybrid", eos_token_id=["<eos>", "<end_of_turn>"],
    final_logit_softcapping=30.0, head_dim=16, hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
    initializer_range=0.02, max_position_embeddings=POSITIONS, model_type="gemma2", pad_token_id="<pad>",
    query_pre_attn_scalar=16, rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=16, torch_dtype="bfloat16",
    transformers_version="4.42.4", use_cache=True, **SIZES,
)  # fmt: skip
GEMMA_ENTRIES = dict(
    add_bos_token=True, add_eos_token=False, additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
    bos_token="<bos>", clean_up_tokenization_spaces=False, eos_token="<eos>", model_max_length=10**30,
    pad_token="<pad>", sp_model_kwargs={}, spaces_between_special_tokens=False, tokenizer_class="GemmaTokenizer",
    unk_token="<unk>",
    use_default_system_prompt=False,
)  # fmt: skip
GEMMA3_NAMES = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")

PHI3_BEHIND = [
    pipelines.added(0, "<|endoftext|>"),
    *(pipelines.added(0, f"<|{name}|>", rstrip=True) for name in (
        "assistant", "placeholder1", "placeholder2", "placeholder3", "placeholder4", "system", "end", "placeholder5",
        "placeholder6", "user",
    )),
]  # fmt: skip
PHI3 = Folder(
    config=dict(
        _name_or_path="Phi-3-mini-4k-instruct", architectures=["Phi3ForCausalLM"], attention_bias=False,
        attention_dropout=0.0,
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config",
                  "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        bos_token_id="<s>", embd_pdrop=0.0, eos_token_id="<|endoftext|>", hidden_act="silu", initializer_range=0.02,
        max_position_embeddings=POSITIONS, model_type="phi3", original_max_position_embeddings=POSITIONS,
        pad_token_id="<|endoftext|>", resid_pdrop=0.0, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0,
        sliding_window=47, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.40.2",
        use_cache=True, **SIZES | {"num_key_value_heads": 4},
    ),
    generation=dict(_from_model_config=True, bos_token_id="<s>", pad_token_id="<|endoftext|>",
                    eos_token_id=["<|endoftext|>", "<|assistant|>", "<|end|>"]),
    tokenizer=lambda: pipelines.sentencepiece(
        ["<unk>", "<s>", "</s>"], PHI3_BEHIND, bos=False, plain={"</s>": {"special": False, "rstrip": True}}
    ),
    entries=dict(
        add_bos_token=False, add_eos_token=False, bos_token="<s>", clean_up_tokenization_spaces=False,
        eos_token="<|endoftext|>", legacy=False, model_max_length=4096, pad_token="<|endoftext|>", padding_side="left",
        sp_model_kwargs={}, tokenizer_class="LlamaTokenizer", unk_token="<unk>", use_default_system_prompt=False,
    ),
    template=templates.PHI3, turn_end="<|end|>", rows=53,
)  # fmt: skip

SMOLLM2_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>",
                  "<filename>", "<gh_stars>", "<issue_start>", "<empty_output>"]  # fmt: skip
SMOLLM2 = Folder(
    config=dict(
        architectures=["LlamaForCausalLM"], attention_bias=False, attention_dropout=0.0, bos_token_id="<|im_start|>",
        eos_token_id="<|im_end|>", hidden_act="silu", initializer_range=0.041666666666666664, is_llama_config=True,
        max_position_embeddings=POSITIONS, mlp_bias=False, model_type="llama", pad_token_id="<|im_end|>",
        pretraining_tp=1, rms_norm_eps=1e-05, rope_interleaved=False, rope_scaling=None, rope_theta=100000,
        tie_word_embeddings=True, torch_dtype="bfloat16", transformers_version="4.42.3", use_cache=True, **SIZES,
    ),
    generation=dict(_from_model_config=True, bos_token_id="<|im_start|>", eos_token_id="<|im_end|>",
                    pad_token_id="<|im_end|>"),
    tokenizer=lambda: pipelines.smollm2(SMOLLM2_TOKENS),
    entries=dict(
        add_prefix_space=False, additional_special_tokens=["<|im_start|>", "<|im_end|>"], bos_token="<|im_start|>",
        clean_up_tokenization_spaces=False, eos_token="<|im_end|>", model_max_length=8192, pad_token="<|im_end|>",
        tokenizer_class="GPT2Tokenizer", unk_token="<|endoftext|>", vocab_size=49152,
    ),
    template=templates.SMOLLM2, turn_end="<|im_end|>", vocabulary_files=True,
)  # fmt: skip

SMOLLM3_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<think>", "</think>", "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
    "<|python_tag|>", "<|im_start|>", "<|im_end|>", "<tool_response>", "</tool_response>", "<tool_call>",
    "</tool_call>", "<code>", "</code>",
]  # fmt: skip
SMOLLM3 = Folder(
    config=dict(
        architectures=["SmolLM3ForCausalLM"], attention_bias=False, attention_dropout=0.0,
        bos_token_id="<|begin_of_text|>", eos_token_id="<|im_end|>", hidden_act="silu", initializer_range=0.02,
        layer_types=["full_attention"] * 2, max_position_embeddings=POSITIONS, max_window_layers=28, mlp_bias=False,
        model_type="smollm3", no_rope_layer_interval=2, no_rope_layers=[1, 0], pad_token_id="<|im_end|>",
        pretraining_tp=2, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=5000000.0, sliding_window=None,
        torch_dtype="bfloat16", transformers_version="4.54.0.dev0", use_cache=False, use_sliding_window=False,
        **SIZES,
    ),
    generation=dict(bos_token_id="<|begin_of_text|>", do_sample=True, eos_token_id="<|im_end|>",
                    pad_token_id="<|im_end|>", temperature=0.6, top_p=0.95),
    tokenizer=lambda: pipelines.llama3(SMOLLM3_TOKENS, None),
    entries=dict(
        bos_token=None, clean_up_tokenization_spaces=True, eos_token="<|im_end|>", extra_special_tokens={}, fast=False,
        model_input_names=["input_ids", "attention_mask"], model_max_length=131072, pad_token="<|im_end|>",
        tokenizer_class="PreTrainedTokenizerFast",
    ),
    template=templates.SMOLLM3, template_file=True, turn_end="<|im_end|>",
)  # fmt: skip

LLAMA2_ENTRIES = dict(
    add_bos_token=True, add_eos_token=False, bos_token="<s>", clean_up_tokenization_spaces=False, eos_token="</s>",
    legacy=False, model_max_length=2048, pad_token="</s>", padding_side="right", sp_model_kwargs={},
    tokenizer_class="LlamaTokenizer", unk_token="<unk>", use_default_system_prompt=False,
)  # fmt: skip
LLAMA2_CONFIG = dict(
    bos_token_id="<s>", eos_token_id="</s>", hidden_act="silu", initializer_range=0.02,
    max_position_embeddings=POSITIONS, rms_norm_eps=1e-05, rope_theta=10000.0, tie_word_embeddings=False,
    torch_dtype="bfloat16", use_cache=True, **SIZES,
)  # fmt: skip
MISTRAL_FIRST = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
                 "[TOOL_RESULTS]", "[/TOOL_RESULTS]", *(f"[control_{i}]" for i in range(8, 16))]  # fmt: skip


def _gpt2_tensors(tensors: dict) -> dict:
    """Without their prefix, and with the causal masks that old versions of transformers saved."""
    import torch

    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    mask = torch.ones(POSITIONS, POSITIONS).tril().view(1, 1, POSITIONS, POSITIONS)
    return renamed | {f"h.{i}.attn.bias": mask.clone() for i in range(2) if f"h.{i}.ln_1.weight" in renamed}


def _neox_tensors(tensors: dict) -> dict:
    """With the head's older name, and the masks and frequencies that old versions of transformers saved."""
    import torch

    tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    mask = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril().view(1, 1, POSITIONS, POSITIONS)
    for layer in {key[: key.index("dense")] for key in tensors if key.endswith("attention.dense.weight")}:
        tensors[layer + "bias"] = mask.clone()
        tensors[layer + "masked_bias"] = torch.tensor(-1e9, dtype=torch.float16).clamp(min=-65504)
        tensors[layer + "rotary_emb.inv_freq"] = torch.ones(1, dtype=torch.float16)
    return tensors


FOLDERS = {
    "Llama-3.2-1B": LLAMA32,
    "Llama-3.2-1B-Instruct": dataclasses.replace(
        LLAMA32, config=LLAMA3_CONFIG | {"eos_token_id": LLAMA3_STOPS}, template=templates.LLAMA3,
        turn_end="<|eot_id|>",
        entries=LLAMA3_ENTRIES | {"eos_token": "<|eot_id|>"},
        generation=LLAMA32.generation | {"eos_token_id": LLAMA3_STOPS},
    ),
    "Qwen2.5-0.5B": QWEN25,
    "Qwen2.5-0.5B-Instruct": dataclasses.replace(
        QWEN25, config=QWEN_CONFIG | {"eos_token_id": "<|im_end|>"}, entries=QWEN_ENTRIES | {"eos_token": "<|im_end|>"},
        generation=QWEN_CHAT | {"repetition_penalty": 1.1}, turn_end="<|im_end|>",
        template=templates.QWEN2_5.replace("DEFAULT", "You are Qwen, a helpful assistant."),
    ),
    "Qwen3-0.6B": dataclasses.replace(
        QWEN25,
        config={key: value for key, value in QWEN_CONFIG.items() if key != "use_mrope"} | dict(
            architectures=["Qwen3ForCausalLM"], attention_bias=False, eos_token_id="<|im_end|>", head_dim=16,
            max_window_layers=28, model_type="qwen3", rope_scaling=None, sliding_window=None,
            transformers_version="4.51.0",
        ),
        tokenizer=lambda: pipelines.qwen([*QWEN_TOKENS, *QWEN3_PLAIN], QWEN3_PLAIN), generation=QWEN_CHAT,
        entries=QWEN_ENTRIES | {"eos_token": "<|im_end|>"}, template=templates.QWEN3, turn_end="<|im_end|>",
    ),
    "gemma-2-2b-it": Folder(
        config=GEMMA_CONFIG, entries=GEMMA_ENTRIES, template=templates.GEMMA2, turn_end="<end_of_turn>", system=False,
        tokenizer=lambda: pipelines.gemma(GEMMA_FIRST),
        generation=dict(_from_model_config=True, bos_token_id="<bos>", cache_implementation="hybrid",
                        eos_token_id=["<eos>", "<end_of_turn>"], pad_token_id="<pad>"),
    ),
    "gemma-3-1b-it": Folder(
        config=GEMMA_CONFIG | dict(
            architectures=["Gemma3ForCausalLM"], attn_logit_softcapping=None, final_logit_softcapping=None,
            model_type="gemma3_text", rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000,
            sliding_window_pattern=2, transformers_version="4.50.0.dev0",
        ),
        entries=GEMMA_ENTRIES | GEMMA3_NAMES | {"extra_special_tokens": GEMMA3_NAMES, "additional_special_tokens": None,
                                                "processor_class": "Gemma3Processor"},
        tokenizer=lambda: pipelines.gemma([*GEMMA_FIRST, *list(GEMMA3_NAMES.values())[:2]], ("<image_soft_token>",)),
        generation=dict(bos_token_id="<bos>", cache_implementation="hybrid", do_sample=True,
                        eos_token_id=["<eos>", "<end_of_turn>"], pad_token_id="<pad>", top_k=64, top_p=0.95),
        template=templates.GEMMA3, turn_end="<end_of_turn>", rows=-1,
    ),
    "Phi-3-mini-4k-instruct": PHI3,
    "SmolLM2-135M-Instruct": SMOLLM2,
    "SmolLM3-3B": SMOLLM3,
    "TinyLlama-1.1B-Chat-v1.0": Folder(
        config=LLAMA2_CONFIG | dict(
            architectures=["LlamaForCausalLM"], attention_bias=False, model_type="llama", pretraining_tp=1,
            rope_scaling=None, transformers_version="4.35.0",
        ),
        entries=LLAMA2_ENTRIES, tokenizer=lambda: pipelines.sentencepiece(["<unk>", "<s>", "</s>"]),
        generation=dict(bos_token_id="<s>", eos_token_id="</s>", max_length=2048, pad_token_id="<unk>"),
        template=templates.TINYLLAMA, turn_end="</s>",
    ),
    "Mistral-7B-Instruct-v0.3": Folder(
        config=LLAMA2_CONFIG | dict(
            architectures=["MistralForCausalLM"], attention_dropout=0.0, model_type="mistral", rope_theta=1000000.0,
            sliding_window=None, transformers_version="4.42.0.dev0",
        ),
        entries={key: value for key, value in LLAMA2_ENTRIES.items() if key not in ("pad_token", "padding_side")} | {
            "add_prefix_space": None, "model_max_length": 10**30, "spaces_between_special_tokens": False,
        },
        tokenizer=lambda: pipelines.sentencepiece(MISTRAL_FIRST, metaspace=True),
        generation=dict(_from_model_config=True, bos_token_id="<s>", eos_token_id="</s>"),
        template=templates.MISTRAL, turn_end="</s>",
    ),
    "gpt2": Folder(
        config=dict(
            activation_function="gelu_new", architectures=["GPT2LMHeadModel"], attn_pdrop=0.1,
            bos_token_id="<|endoftext|>", embd_pdrop=0.1, eos_token_id="<|endoftext|>", initializer_range=0.02,
            layer_norm_epsilon=1e-05,
            model_type="gpt2", n_ctx=POSITIONS, n_embd=32, n_head=4, n_layer=2, n_positions=POSITIONS, resid_pdrop=0.1,
            summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index",
            summary_use_proj=True, task_specific_params={"text-generation": {"do_sample": True, "max_length": 50}},
        ),
        entries={"model_max_length": 1024}, tokenizer=pipelines.gpt2, decoder_listed=False, special_map=False,
        generation=dict(_from_model_config=True, bos_token_id="<|endoftext|>", eos_token_id="<|endoftext|>"),
        vocabulary_files=True, rename=_gpt2_tensors,
    ),
    "pythia-70m": Folder(
        config=dict(
            architectures=["GPTNeoXForCausalLM"], bos_token_id="<|endoftext|>", eos_token_id="<|endoftext|>",
            hidden_act="gelu", hidden_size=32, initializer_range=0.02, intermediate_size=48, layer_norm_eps=1e-05,
            max_position_embeddings=POSITIONS, model_type="gpt_neox", num_attention_heads=2, num_hidden_layers=2,
            rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False, torch_dtype="float16",
            transformers_version="4.24.0", use_cache=True, use_parallel_residual=True,
        ),
        entries=dict(add_prefix_space=False, bos_token="<|endoftext|>", eos_token="<|endoftext|>",
                     tokenizer_class="GPTNeoXTokenizer", unk_token="<|endoftext|>"),
        tokenizer=lambda: pipelines.neox(["<|endoftext|>", "<|padding|>"], 5), decoder_listed=False, rows=27,
        rename=_neox_tensors,
    ),
}  # fmt: skip


def make(name: str, target: str | Path, seed: int = 0, layers: int | None = None) -> Path:
    """Writes the folder called `name` into `target`, which is made; returns it.

    `layers` changes their number, where the layers of the folder are all alike; in GPT-NeoX, two are the least for an
    MLP to see what attention has found.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    folder, path = FOLDERS[name], Path(target)
    path.mkdir(parents=True)
    tokenizer = folder.tokenizer()
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    config = _with_ids(folder.config, ids) | {"vocab_size": len(ids) + folder.rows}
    if layers is not None and config["model_type"] not in ("gemma2", "gemma3_text", "smollm3", "gpt_neox"):
        config["n_layer" if "n_layer" in config else "num_hidden_layers"] = layers
    _write(path / "tokenizer.json", tokenizer)
    _write(path / "tokenizer_config.json", _entries(folder, tokenizer))
    _write(path / "config.json", dict(sorted(config.items())))
    if folder.generation is not None:
        version = {key: folder.config[key] for key in ("transformers_version",) if key in folder.config}
        _write(path / "generation_config.json", _with_ids(folder.generation, ids) | version)
    if folder.special_map:
        _write(path / "special_tokens_map.json", _special_map(folder, tokenizer))
    if folder.template_file:
        (path / "chat_template.jinja").write_text(folder.template, encoding="utf-8")
    if folder.vocabulary_files:
        _write(path / "vocab.json", tokenizer["model"]["vocab"], indent=None)
        merges = "".join(f"{first} {second}\n" for first, second in tokenizer["model"]["merges"])
        (path / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")

    read = transformers.AutoConfig.from_pretrained(str(path))
    model = transformers.AutoModelForCausalLM.from_config(read, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(SCALE * torch.randn(weight.shape, generator=generator))
    tied = {"lm_head.weight"} if read.tie_word_embeddings else set()
    dtype = getattr(torch, folder.config.get("torch_dtype", "float32"))
    tensors = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items() if key not in tied}
    tensors = folder.rename(tensors) if folder.rename is not None else tensors
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def _with_ids(entries: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """Entries with ids in place of tokens."""
    return {
        key: ([ids[token] for token in value] if isinstance(value, list) else ids[value]) if key in PLACES else value
        for key, value in entries.items()
    }


def _entries(folder: Folder, tokenizer: dict) -> dict[str, Any]:
    """tokenizer_config.json."""
    entries = {key: value for key, value in folder.entries.items() if key != "additional_special_tokens" or value}
    if folder.decoder_listed:
        entries["added_tokens_decoder"] = {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in tokenizer["added_tokens"]
        }
    if folder.template is not None and not folder.template_file:
        entries["chat_template"] = folder.template
    return dict(sorted(entries.items()))


def _special_map(folder: Folder, tokenizer: dict) -> dict[str, Any]:
    """special_tokens_map.json."""
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word")
    named = {key: folder.entries.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    special = {key: {flag: added[token][flag] for flag in flags} for key, token in named.items() if token}
    more = folder.entries.get("additional_special_tokens")
    return ({"additional_special_tokens": more} if more else {}) | special


def _write(path: Path, document: dict, indent: int | None = 2) -> None:
    path.write_text(json.dumps(document, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[2:] or FOLDERS:
        print(make(name, Path(sys.argv[1]) / name))
