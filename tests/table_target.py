"""A target that is a table, its logits a function of the last two tokens; trees drafted for it, and decoding with and without them."""

import itertools

import torch
from transformers import (
    LogitsProcessorList,
    MaxLengthCriteria,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from confu_hf.decoding.acceptance import accept
from confu_hf.tree.draft_tree import DraftTree

VOCAB = 5
PROMPT = [3, 1, 4]


class Target:
    def __init__(self, seed=0, dtype=torch.float32):
        table = torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.table = (1.5 * table).to(dtype)

    def logits(self, ids):
        return self.table[ids[-2], ids[-1]]

    def verify(self, tree, ids):
        """(1, T+1, V): the logits after the context and each node's path."""
        paths = []
        for token, parent in zip(tree.tokens[0].tolist(), tree.parents[0].tolist(), strict=True):
            paths.append([*ids[:-1], token] if parent < 0 else [*paths[parent], token])
        return torch.stack([self.logits(path) for path in paths])[None]


def make_tree(root, drafted):
    """A tree from a list of drafted (parent, token)."""
    parents, tokens = [-1, *(parent for parent, _ in drafted)], [root, *(token for _, token in drafted)]
    depths = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return DraftTree(
        torch.tensor([tokens]), torch.tensor([parents]), torch.tensor([depths]), -torch.tensor([depths]).float()
    )


def full_tree(root, depth):
    """All continuations of `depth` tokens: the walk can leave it only at the bottom."""
    drafted, layer = [], [0]
    for _ in range(depth):
        next_layer = []
        for parent, token in itertools.product(layer, range(VOCAB)):
            drafted.append((parent, token))
            next_layer.append(len(drafted))
        layer = next_layer
    return make_tree(root, drafted)


def random_tree(root, rng, num_nodes=12):
    drafted = set()
    ordered = []
    for _ in range(num_nodes):
        node = (rng.randrange(len(ordered) + 1), rng.randrange(VOCAB))
        if node not in drafted:
            drafted.add(node)
            ordered.append(node)
    return make_tree(root, ordered)


def plain_decoding(target, num_tokens, processors, do_sample, stopping_criteria=None):
    """The loop of GenerationMixin._sample, reduced to what matters here."""
    ids, scores, raw_logits = torch.tensor([PROMPT]), (), ()
    for _ in range(num_tokens):
        logits = target.logits(ids[0].tolist())[None].to(copy=True, dtype=torch.float32)
        token_scores = processors(ids, logits)
        scores, raw_logits = scores + (token_scores,), raw_logits + (logits,)
        if do_sample:
            token = torch.multinomial(torch.nn.functional.softmax(token_scores, dim=-1), num_samples=1).squeeze(1)
        else:
            token = torch.argmax(token_scores, dim=-1)
        ids = torch.cat([ids, token[:, None]], dim=-1)
        if stopping_criteria is not None and stopping_criteria(ids, None).all():
            break
    return ids[0].tolist(), scores, raw_logits


def tree_decoding(target, num_tokens, processors, do_sample, draw_tree, **options):
    """Rounds of accept() until `num_tokens` are there or a criterion stops them."""
    ids, scores, raw_logits = list(PROMPT), (), ()
    criteria = options.pop("stopping_criteria", StoppingCriteriaList([MaxLengthCriteria(len(PROMPT) + num_tokens)]))
    finished, rounds = False, 0
    while not finished:
        tree = draw_tree(ids[-1])
        options |= {"processors": processors, "do_sample": do_sample, "stopping_criteria": criteria}
        acceptance = run(tree, target.verify(tree, ids), torch.tensor([ids]), past_scores=scores, **options)
        scores, raw_logits = scores + acceptance.scores[0], raw_logits + acceptance.raw_logits[0]
        ids += acceptance.tokens[0].tolist()
        (finished,) = acceptance.finished
        rounds += 1
    return ids, scores, raw_logits, rounds


def check_path(tree, acceptance):
    path, tokens = acceptance.path[0].tolist(), acceptance.tokens[0].tolist()
    assert len(path) == len(tokens) and path[0] == 0
    for parent, child, token in zip(path, path[1:], tokens, strict=False):
        assert tree.parents[0, child] == parent and tree.tokens[0, child] == token


def run(tree, logits, ids=None, **options):
    """accept() after the prompt; greedy, with no processor and no criterion, if nothing else is given."""
    ids = torch.tensor([PROMPT]) if ids is None else ids
    defaults = {"processors": LogitsProcessorList(), "stopping_criteria": StoppingCriteriaList(), "do_sample": False}
    acceptance = accept(tree, logits, ids, **{**defaults, **options})
    check_path(tree, acceptance)
    return acceptance


def processor_list(name):
    return LogitsProcessorList(
        {
            "none": [],
            "temperature": [TemperatureLogitsWarper(0.7)],
            "warpers": [TemperatureLogitsWarper(1.3), TopKLogitsWarper(4), TopPLogitsWarper(0.8)],
            "repetition": [RepetitionPenaltyLogitsProcessor(1.4), TopPLogitsWarper(0.95)],
        }[name]
    )
