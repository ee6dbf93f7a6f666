"""What the target computes on a tree, in float64: every node as in plain decoding, whatever contemplates beside it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    LAYER_IDS,
    NUM_LAYERS,
    VOCAB_SIZE,
    keep_softmax_in_float64,
    tiny_llama,
    tiny_mistral,
    tiny_target,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from confu_hf.target.cache import TreeCache
from confu_hf.target.context import ContemplateContext
from confu_hf.target.geometry import attention_geometry
from confu_hf.target.passes import Verified, contemplate_anchors, prefill, verify
from confu_hf.target.soft_prompts import soft_prompt_key_values
from confu_hf.target.support import check_supported
from confu_hf.tree.draft_tree import DraftTree
from confu_hf.tree.layout import verify_layout

PROMPTS, LENGTH, PADDING = 5, 11, 3
PARENTS = torch.tensor([[-1, 0, 0, 1, 1, 2, 3, 6], [-1, 0, 1, 0, 2, 4, 4, 3]])
EXACT = {"rtol": 0.0, "atol": 1e-12}

targets = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(autouse=True)
def _exact_softmax(monkeypatch):
    keep_softmax_in_float64(monkeypatch)


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def random_tree(seed: int = 2) -> DraftTree:
    """Two trees of seven drafted nodes."""
    depths = torch.zeros_like(PARENTS)
    for node in range(1, PARENTS.shape[1]):
        depths[:, node] = depths.gather(1, PARENTS[:, node : node + 1])[:, 0] + 1
    tokens = random_tokens(*PARENTS.shape, seed=seed)
    return DraftTree(tokens=tokens, parents=PARENTS, depths=depths, log_probs=-depths.double())


def path_to(tree: DraftTree, row: int, node: int) -> list[int]:
    path = []
    while node >= 0:
        path.insert(0, node)
        node = int(tree.parents[row, node])
    return path


def prompt() -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of 11 and 8 tokens, the second padded on the left: ids, mask, positions (-1 = padding)."""
    ids, mask = random_tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :PADDING] = 0
    positions = torch.where(mask.bool(), mask.cumsum(-1) - 1, -1)
    return ids, mask, positions


def soft_prompts(seed: int = 3, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(NUM_LAYERS, 2, PROMPTS, 2, 8, generator=generator, dtype=torch.float64)


def embedding(seed: int = 4) -> Tensor:
    return torch.randn(2, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def verify_tree(
    model: PreTrainedModel, tree: DraftTree, nodes: Tensor, prompts: Tensor | None, con: Tensor | None
) -> tuple[Verified, TreeCache]:
    ids, mask, positions = prompt()
    cache = TreeCache(NUM_LAYERS, prompts, capacity=8)
    prefill(model, ids, cache, LAYER_IDS, attention_mask=mask)
    cache.set_mask(mask)
    layout = verify_layout(tree, nodes, slot_position_ids=positions, soft_prompt_length=cache.soft_prompt_length)
    return verify(model, layout, con, cache, LAYER_IDS), cache


def plain_forward(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Reference: logits `(n, V)` and features `(n, 3 d)` of one unpadded sequence, without cache or mask."""
    with torch.no_grad():
        output = model(tokens[None], use_cache=False, output_hidden_states=True)
    return output.logits[0], torch.cat([output.hidden_states[i][0] for i in LAYER_IDS], dim=-1)


def assert_nodes_match_plain_decoding(
    model: PreTrainedModel, tree: DraftTree, verified: Verified, contexts: list[Tensor]
):
    for row, context in enumerate(contexts):
        for node in range(tree.tokens.shape[1]):
            path = tree.tokens[row, path_to(tree, row, node)]
            logits, features = plain_forward(model, torch.cat([context, path]))
            torch.testing.assert_close(verified.logits[row, node], logits[-1], **EXACT)
            torch.testing.assert_close(verified.features[row, node], features[-1], **EXACT)


def contexts() -> list[Tensor]:
    ids = prompt()[0]
    return [ids[0], ids[1, PADDING:]]


ALL_NODES = torch.arange(PARENTS.shape[1]).expand(2, -1)
SOME_NODES = torch.tensor([[0, 3, 7], [2, 3, 5]])
NO_NODES = torch.empty(2, 0, dtype=torch.long)


@targets
def test_every_node_is_what_plain_decoding_computes(name):
    model, tree = ARCHITECTURES[name](), random_tree()
    verified, _ = verify_tree(model, tree, ALL_NODES, soft_prompts(), embedding())
    assert verified.logits.shape == (2, 8, VOCAB_SIZE) and verified.futures.shape == (2, 8, 96)
    assert_nodes_match_plain_decoding(model, tree, verified, contexts())


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
def test_eager_attention_gives_the_same(make):
    model, tree = make(attn_implementation="eager"), random_tree()
    verified, _ = verify_tree(model, tree, SOME_NODES, soft_prompts(), embedding())
    assert_nodes_match_plain_decoding(model, tree, verified, contexts())


@targets
def test_nodes_do_not_depend_on_contemplation(name):
    model, tree = ARCHITECTURES[name](), random_tree()
    without, _ = verify_tree(model, tree, NO_NODES, None, None)
    assert without.futures is None
    variants = [
        (SOME_NODES, soft_prompts(), embedding()),
        (ALL_NODES, soft_prompts(seed=9, scale=30.0), embedding(seed=9) * 30.0),
        (NO_NODES, soft_prompts(), None),
    ]
    for nodes, prompts, con in variants:
        verified, _ = verify_tree(model, tree, nodes, prompts, con)
        torch.testing.assert_close(verified.logits, without.logits, **EXACT)
        torch.testing.assert_close(verified.features, without.features, **EXACT)


@targets
def test_contemplate_tokens_do_depend_on_prompts_and_embedding(name):
    model, tree = ARCHITECTURES[name](), random_tree()
    futures = [
        verify_tree(model, tree, SOME_NODES, prompts, con)[0].futures
        for prompts, con in [
            (soft_prompts(), embedding()),
            (soft_prompts(9), embedding()),
            (soft_prompts(), embedding(9)),
        ]
    ]
    assert (futures[0] - futures[1]).abs().amax(dim=-1).min() > 1e-3
    assert (futures[0] - futures[2]).abs().amax(dim=-1).min() > 1e-3


@targets
def test_contemplate_tokens_do_not_see_each_other(name):
    model, tree = ARCHITECTURES[name](), random_tree()
    everywhere, _ = verify_tree(model, tree, ALL_NODES, soft_prompts(), embedding())
    somewhere, _ = verify_tree(model, tree, SOME_NODES, soft_prompts(), embedding())
    chosen = everywhere.futures.gather(1, SOME_NODES[..., None].expand(-1, -1, 96))
    torch.testing.assert_close(somewhere.futures, chosen, **EXACT)


@targets
@pytest.mark.parametrize("paths", [[[0, 1, 3, 6], [0, 1, 2, 4]], [[0, 1, 3, 6], [0, 1]], [[0], [0, 1, 2, 4]]])
def test_kept_path_leaves_the_cache_of_a_plain_forward(name, paths):
    """Also where the rows of a batch accept different numbers of tokens."""
    model, tree = ARCHITECTURES[name](), random_tree()
    _, cache = verify_tree(model, tree, SOME_NODES, soft_prompts(), embedding())
    assert [path_to(tree, b, path[-1]) for b, path in enumerate(paths)] == paths
    width = max(map(len, paths))
    padded = torch.tensor([path + [-1] * (width - len(path)) for path in paths])
    cache.keep_path(padded, [len(path) for path in paths])
    accepted = [torch.cat([c, tree.tokens[b, paths[b]]]) for b, c in enumerate(contexts())]
    for row, tokens in enumerate(accepted):
        reference = DynamicCache()
        prefill(model, tokens[None], reference, LAYER_IDS)
        end = cache.lengths[row]
        for layer, expected in zip(cache.layers, reference.layers, strict=True):
            stored = expected.keys.shape[2]
            torch.testing.assert_close(layer.keys[row, :, end - stored : end], expected.keys[0], **EXACT)
            torch.testing.assert_close(layer.values[row, :, end - stored : end], expected.values[0], **EXACT)

    following = random_tree(seed=7)
    layout = verify_layout(
        following,
        ALL_NODES,
        slot_position_ids=cache.slot_position_ids,
        soft_prompt_length=PROMPTS,
        lengths=cache.lengths,
        root_places=cache.next_positions(),
    )
    verified = verify(model, layout, embedding(), cache, LAYER_IDS)
    assert_nodes_match_plain_decoding(model, following, verified, accepted)


@targets
@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_training_anchors_are_the_futures_of_inference(name, kind):
    """An anchor after row t of a finished sequence = the contemplate token of a root t+1 tokens in."""
    model = ARCHITECTURES[name]()
    ids, con = random_tokens(2, LENGTH), torch.randn(2, 3, 32, dtype=torch.float64)
    prompts = soft_prompts() if kind == "kv" else soft_prompt_key_values(model, torch.randn(PROMPTS, 32).double())
    whole = DynamicCache()
    prefill(model, ids, whole, LAYER_IDS)
    anchors = torch.tensor([[0, 4, 10], [3, 7, 9]])
    mask = torch.arange(LENGTH) <= anchors[..., None]  # (B, K, C)
    context = ContemplateContext(whole, prompts)
    futures, last = contemplate_anchors(model, context, con, anchors + 1, mask, LAYER_IDS)
    for row in range(2):
        for k, anchor in enumerate(anchors[row].tolist()):
            cache, zeros = TreeCache(NUM_LAYERS, prompts), torch.zeros(1, 1, dtype=torch.long)
            if anchor:
                prefill(model, ids[row : row + 1, :anchor], cache, LAYER_IDS)
            root = ids[row : row + 1, anchor : anchor + 1]
            tree = DraftTree(tokens=root, parents=zeros - 1, depths=zeros, log_probs=zeros.double())
            layout = verify_layout(
                tree, zeros, slot_position_ids=torch.arange(anchor)[None], soft_prompt_length=PROMPTS
            )
            verified = verify(model, layout, con[row : row + 1, k], cache, LAYER_IDS)
            torch.testing.assert_close(futures[row, k], verified.futures[0, 0], **EXACT)


def test_training_anchors_in_left_padded_rows():
    model = tiny_mistral()
    ids, mask, positions = prompt()
    con, prompts, anchor = torch.randn(1, 1, 32, dtype=torch.float64), soft_prompts(), 9
    futures = []
    for row_ids, row_mask in [(ids[1:], mask[1:]), (ids[1:, PADDING:], None)]:
        whole = DynamicCache()
        prefill(model, row_ids, whole, LAYER_IDS, attention_mask=row_mask)
        slots = torch.arange(row_ids.shape[1])
        visible = slots <= anchor if row_mask is not None else slots <= anchor - PADDING
        visible = (visible & row_mask.bool() if row_mask is not None else visible[None])[:, None]
        position = positions[1:, anchor : anchor + 1] + 1
        context = ContemplateContext(whole, prompts)
        futures.append(contemplate_anchors(model, context, con, position, visible, LAYER_IDS)[0])
    torch.testing.assert_close(*futures, **EXACT)


@targets
def test_gradients_reach_prompts_and_embeddings_only(name):
    model, ids = ARCHITECTURES[name](), random_tokens(2, LENGTH)
    whole = DynamicCache()
    prefill(model, ids, whole, LAYER_IDS)
    virtual = torch.randn(PROMPTS, 32, dtype=torch.float64, requires_grad=True)
    con = torch.randn(2, 2, 32, dtype=torch.float64, requires_grad=True)
    prompts = soft_prompt_key_values(model, virtual)
    assert prompts.shape == (NUM_LAYERS, 2, PROMPTS, 2, 8)
    mask = torch.arange(LENGTH) <= torch.tensor([[2, 8]] * 2)[..., None]
    positions = torch.tensor([[3, 9]] * 2)
    futures, _ = contemplate_anchors(model, ContemplateContext(whole, prompts), con, positions, mask, LAYER_IDS)
    futures.square().sum().backward()
    assert virtual.grad.abs().sum(-1).min() > 0 and con.grad.abs().sum(-1).min() > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_soft_prompts_from_embeddings_are_a_plain_prefix():
    model, tokens = tiny_llama(), random_tokens(1, PROMPTS)
    reference = DynamicCache()
    prefill(model, tokens, reference, LAYER_IDS)
    prompts = soft_prompt_key_values(model, model.get_input_embeddings()(tokens[0]))
    for prompt_states, layer in zip(prompts, reference.layers, strict=True):
        torch.testing.assert_close(prompt_states[0].transpose(0, 1), layer.keys[0], **EXACT)
        torch.testing.assert_close(prompt_states[1].transpose(0, 1), layer.values[0], **EXACT)


def test_prefill_continues_a_cache():
    model, ids = tiny_llama(), random_tokens(1, LENGTH)
    cache = TreeCache(NUM_LAYERS)
    first = prefill(model, ids[:, :4], cache, LAYER_IDS)
    second = prefill(model, ids[:, 4:], cache, LAYER_IDS)
    logits, features = plain_forward(model, ids[0])
    torch.testing.assert_close(second.logits[0], logits[-1], **EXACT)
    torch.testing.assert_close(torch.cat([first.features, second.features], dim=1)[0], features, **EXACT)


def test_a_layout_for_another_cache_is_refused():
    model, tree = tiny_llama(), random_tree()
    cache = TreeCache(NUM_LAYERS, soft_prompts())
    layout = verify_layout(tree, SOME_NODES, slot_position_ids=prompt()[2], soft_prompt_length=PROMPTS)
    with pytest.raises(ValueError, match="for 5 soft prompts and 27 slots, expected 5 and 16"):
        verify(model, layout, embedding(), cache, LAYER_IDS)
    with pytest.raises(ValueError, match="3 contemplate tokens, and contemplate_embedding=None"):
        verify(model, layout, None, cache, LAYER_IDS)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_is_refused():
    model = tiny_llama().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing.*model.eval"):
        soft_prompt_key_values(model, torch.randn(2, 32).double())


@targets
def test_geometry_and_support(name):
    model = ARCHITECTURES[name]()
    assert check_supported(model) is None
    assert attention_geometry(model.config) == (NUM_LAYERS, 2, 8)


def test_geometry_without_explicit_fields():
    config = CONFIG_MAPPING["gpt_neox"](hidden_size=32, num_attention_heads=4, num_hidden_layers=3)
    assert attention_geometry(config) == (3, 4, 8)


UNSUPPORTED = {
    "mamba": ({"state_size": 4, "attn_implementation": "eager"}, "recurrent.*attention-only target"),
    "recurrent_gemma": (
        {"lru_width": 32, "block_types": ["recurrent", "attention"]},
        "recurrent.*attention-only target",
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 4}, r"recurrent.*\(conv\).*attention-only target"),
    "bloom": (
        {"n_layer": 2, "n_head": 4, "attn_implementation": "eager"},
        r"does not take position_ids.*rotary positions",
    ),
}


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_unsupported_architectures_are_named(model_type):
    fields, message = UNSUPPORTED[model_type]
    with pytest.raises(ValueError, match=message):
        check_supported(tiny_target(model_type, **fields))


def test_linear_attention_layers_are_refused():
    fields = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    linear = {f"linear_{kind}": 8 for kind in ("key_head_dim", "value_head_dim")}
    with pytest.raises(ValueError, match=r"recurrent.*\(linear_attention\)"):
        check_supported(tiny_target("qwen3_next", **fields, **linear))


def test_encoder_decoders_and_headless_models_are_refused():
    t5 = CONFIG_MAPPING["t5"](vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder, expected a decoder-only model.*AutoModelForCausalLM"):
        check_supported(AutoModelForSeq2SeqLM.from_config(t5))
    with pytest.raises(ValueError, match="no LM head.*AutoModelForCausalLM"):
        check_supported(tiny_llama().model)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_without_dense_masks_is_refused(implementation):
    model = tiny_llama()
    model.config._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=rf"{implementation}.*expected one of.*set_attn_implementation\(\"sdpa\"\)"):
        check_supported(model)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size_per_layer_input", 4, "embeddings of tokens for every layer"),
        ("cross_attention_layers", [2], "attend to an image or an encoder"),
        ("num_kv_shared_layers", 2, "share keys and values"),
        ("use_bidirectional_attention", True, "both directions"),
        ("alibi", True, "ALiBi"),
    ],
)
def test_unsupported_options_are_refused(field, value, message):
    model = tiny_llama()
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=message):
        check_supported(model)


def test_auto_class_is_what_the_message_advises():
    config = CONFIG_MAPPING["llama"](
        vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    assert check_supported(AutoModelForCausalLM.from_config(config)) is None
