"""Index work of the draft tree, against brute force, with a lookup table in place of the draft."""

import inspect
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from confu_hf.tree.draft_tree import DraftTree, root_only
from confu_hf.tree.ends import likeliest_ends, nearest_contemplated
from confu_hf.tree.growing import grow_tree
from confu_hf.tree.layout import VerifyLayout, verify_layout

quick = settings(max_examples=60, deadline=None)


class TableDraft:
    """A draft whose children depend on nothing but the path from the root: mixed-up rows or parents are noticed.

    Log-probabilities are multiples of 1/4, from 0 (a certain child) down: sums are exact and ties frequent.
    """

    def __init__(self, seed, top_k, vocab_size=50):
        self.seed, self.top_k, self.vocab_size = seed, top_k, vocab_size
        self.widths, self.paths = [], None

    def children(self, path):
        rng = random.Random(repr((self.seed, path)))
        tokens = rng.sample(range(self.vocab_size), self.top_k)
        log_probs = sorted((-rng.randrange(9) / 4 for _ in tokens), reverse=True)
        return tokens, log_probs

    def __call__(self, tokens, parents, top_k):
        self.widths.append(tokens.shape[1])
        if parents is None:
            self.paths = [[(token,) for token in row] for row in tokens.tolist()]
        else:
            self.paths = [
                [old[parent] + (token,) for token, parent in zip(token_row, parent_row, strict=True)]
                for old, token_row, parent_row in zip(self.paths, tokens.tolist(), parents.tolist(), strict=True)
            ]
        children = [[self.children(path) for path in row] for row in self.paths]
        child_tokens = torch.tensor([[tokens for tokens, _ in row] for row in children])
        return child_tokens, torch.tensor([[log_probs for _, log_probs in row] for row in children])


def eagle2_reference(draft, root, total_tokens, depth):
    """EAGLE-2's selection on plain lists: [(path, joint log-probability)] of the kept nodes, root first."""
    beam, candidates = [((root,), 0.0)], []
    for _ in range(depth):
        layer = []
        for path, joint in beam:
            for token, log_prob in zip(*draft.children(path), strict=True):
                layer.append((path + (token,), joint + log_prob))
        candidates += layer
        beam = sorted(layer, key=lambda node: -node[1])[: draft.top_k]  # Python's sort is stable
    best = sorted(range(len(candidates)), key=lambda i: -candidates[i][1])[:total_tokens]
    return [((root,), 0.0)] + [candidates[i] for i in sorted(best)]


def node_paths(tree, row):
    paths = []
    for token, parent in zip(tree.tokens[row].tolist(), tree.parents[row].tolist(), strict=True):
        paths.append((token,) if parent < 0 else paths[parent] + (token,))
    return paths


def ancestors_or_self(parents, node):
    found = []
    while node >= 0:
        found.append(node)
        node = parents[node]
    return found  # nearest first


def make_tree(parents, probabilities=None):
    """A one-row tree from a list of parents; conditional probability 1/2 for every node but the root."""
    depths = [len(ancestors_or_self(parents, node)) - 1 for node in range(len(parents))]
    if probabilities is None:
        probabilities = [0.5**depth for depth in depths]
    return DraftTree(
        tokens=torch.arange(100, 100 + len(parents))[None],
        parents=torch.tensor([parents]),
        depths=torch.tensor([depths]),
        log_probs=torch.tensor([probabilities], dtype=torch.float64).log(),
    )


def stack_trees(trees):
    return DraftTree(*(torch.cat([getattr(tree, name) for tree in trees]) for name in DraftTree.__dataclass_fields__))


parent_lists = st.lists(st.integers(0, 10**6), max_size=14).map(
    lambda numbers: [-1] + [number % (i + 1) for i, number in enumerate(numbers)]
)


@quick
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 5), st.integers(0, 40))
def test_grow_tree_is_eagle2(seed, top_k, depth, total_tokens):
    roots = [7, 3, 7]
    tree = grow_tree(TableDraft(seed, top_k), torch.tensor(roots), total_tokens=total_tokens, depth=depth, top_k=top_k)
    for row, root in enumerate(roots):
        reference = eagle2_reference(TableDraft(seed, top_k), root, total_tokens, depth)
        assert node_paths(tree, row) == [path for path, _ in reference]
        assert tree.log_probs[row].tolist() == [joint for _, joint in reference]
        assert tree.depths[row].tolist() == [len(path) - 1 for path, _ in reference]


@quick
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 40))
def test_tree_invariants(seed, top_k, depth, total_tokens):
    draft = TableDraft(seed, top_k)
    tree = grow_tree(draft, torch.tensor([1, 2]), total_tokens=total_tokens, depth=depth, top_k=draft.top_k)
    num_candidates = top_k + (depth - 1) * top_k**2
    assert tree.tokens.shape == (2, 1 + min(total_tokens, num_candidates))
    assert tree.parents[:, 0].tolist() == [-1, -1]
    nodes = torch.arange(tree.tokens.shape[1])
    assert (tree.parents < nodes).all() and (tree.parents[:, 1:] >= 0).all()
    assert (tree.log_probs[:, 1:] <= tree.log_probs.gather(1, tree.parents[:, 1:])).all()
    assert draft.widths == ([1] + [top_k] * (depth - 1) if total_tokens else [])
    for row in range(2):
        assert len(set(node_paths(tree, row))) == tree.tokens.shape[1]


@quick
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), st.sampled_from([0.01, 0.2, 0.5])
)
def test_a_threshold_only_leaves_out_nodes_below_it(seed, top_k, depth, total_tokens, threshold):
    root, draft = torch.tensor([7]), TableDraft(seed, top_k)
    tree = grow_tree(draft, root, total_tokens=total_tokens, depth=depth, top_k=top_k, confidence_threshold=threshold)
    whole = grow_tree(TableDraft(seed, top_k), root, total_tokens=total_tokens, depth=depth, top_k=top_k)
    wanted = [node for node, log_prob in enumerate(whole.log_probs[0].tolist()) if log_prob >= math.log(threshold)]
    paths = node_paths(whole, 0)
    assert node_paths(tree, 0) == [paths[node] for node in wanted]
    assert tree.log_probs[0].tolist() == whole.log_probs[0, wanted].tolist()
    assert len(draft.widths) <= depth


def test_drafting_stops_where_no_further_node_could_stay():
    def halves(tokens, parents, top_k):
        calls.append(tokens.shape[1])
        return torch.tensor([[[1, 2]]]).expand(1, tokens.shape[1], 2), torch.full(
            (1, tokens.shape[1], 2), math.log(0.5)
        )

    for threshold, total_tokens, steps, nodes in [(0.3, 30, 2, 2), (0.2, 30, 3, 6), (0.2, 2, 1, 2), (0.6, 30, 1, 0)]:
        calls = []
        tree = grow_tree(
            halves, torch.tensor([5]), total_tokens=total_tokens, depth=9, top_k=2, confidence_threshold=threshold
        )
        assert (len(calls), tree.tokens.shape[1]) == (steps, nodes + 1)


@quick
@given(st.integers(0, 10**6), st.integers(1, 30))
def test_batch_equals_its_rows_alone(seed, total_tokens):
    def grow(roots):
        return grow_tree(TableDraft(seed, 3), torch.tensor(roots), total_tokens=total_tokens, depth=4, top_k=3)

    def pipeline(tree, committed):
        nodes = likeliest_ends(tree, 3)
        layout = verify_layout(tree, nodes, slot_position_ids=committed, soft_prompt_length=2)
        fields = [layout.tokens, layout.position_ids, layout.key_places, layout.mask]
        return [tree.parents, tree.log_probs, nodes, nearest_contemplated(tree, nodes), *fields]

    committed = torch.tensor([[-1, -1, 0, 1], [0, 1, 2, 3], [-1, 0, -1, 1]])
    together = pipeline(grow([4, 5, 6]), committed)
    for row in range(3):
        alone = pipeline(grow([4 + row]), committed[row : row + 1])
        for batched, single in zip(together, alone, strict=True):
            assert torch.equal(batched[row : row + 1], single)


def test_certain_children_never_overtake_their_parents():
    def certain(tokens, parents, top_k):
        # Two children each: a certain one, a hair above log 1 as rounding may leave it, and an impossible one.
        log_probs = torch.tensor([1e-6, -torch.inf]).expand(*tokens.shape, 2)
        return torch.stack([tokens + 1, tokens + 100], dim=-1), log_probs

    for total_tokens in range(1, 8):
        tree = grow_tree(certain, torch.tensor([0]), total_tokens=total_tokens, depth=5, top_k=2)
        assert tuple(range(min(total_tokens, 5) + 1)) in node_paths(tree, 0)
        assert (tree.parents[0] < torch.arange(total_tokens + 1)).all()


def test_half_precision_log_probs_are_added_in_float32():
    def half(tokens, parents, top_k):
        return tokens.unsqueeze(-1) + 1, torch.full((*tokens.shape, 1), -1.0, dtype=torch.bfloat16)

    tree = grow_tree(half, torch.tensor([0]), total_tokens=300, depth=300, top_k=1)
    assert tree.log_probs.dtype == torch.float32
    assert tree.log_probs[0, -1].item() == -300.0  # bfloat16 has no 257 and would stop counting at 256


@pytest.mark.parametrize("total_tokens, depth", [(0, 3), (4, 0)])
def test_a_tree_of_only_the_root(total_tokens, depth):
    def no_draft(tokens, parents, top_k):
        raise AssertionError("the draft must not run")

    tree = grow_tree(no_draft, torch.tensor([5, 6]), total_tokens=total_tokens, depth=depth, top_k=2)
    assert tree.tokens.tolist() == [[5], [6]] and tree.parents.tolist() == [[-1], [-1]]
    assert tree.depths.tolist() == [[0], [0]] and tree.log_probs.tolist() == [[0.0], [0.0]]
    assert tree.ancestor_mask().tolist() == [[[True]], [[True]]]
    assert likeliest_ends(tree, 5).tolist() == [[0], [0]]


def test_one_drafted_node():
    draft = TableDraft(0, 3)
    tree = grow_tree(draft, torch.tensor([5]), total_tokens=1, depth=1, top_k=3)
    assert tree.tokens.tolist() == [[5, draft.children((5,))[0][0]]]
    assert tree.parents.tolist() == [[-1, 0]] and draft.widths == [1]


@quick
@given(parent_lists)
def test_ancestor_mask(parents):
    mask = make_tree(parents).ancestor_mask()[0]
    for node in range(len(parents)):
        assert sorted(ancestors_or_self(parents, node)) == mask[node].nonzero().flatten().tolist()


def test_ancestor_mask_of_a_chain_reaches_the_root():
    for length in range(1, 20):
        mask = make_tree(list(range(-1, length - 1))).ancestor_mask()[0]
        assert torch.equal(mask, torch.ones(length, length, dtype=torch.bool).tril())


@quick
@given(parent_lists, st.integers(0, 16), st.randoms(use_true_random=False))
def test_likeliest_ends(parents, count, rng):
    # Sixty-fourths of the parent's probability are shared among its children: sums are close to exact, ties happen.
    probabilities = [1.0]
    for node in range(1, len(parents)):
        siblings = parents.count(parents[node])
        probabilities.append(probabilities[parents[node]] * rng.randrange(1, 64 // siblings + 1) / 64)
    ends = [
        probability - sum(probabilities[c] for c in range(len(parents)) if parents[c] == node)
        for node, probability in enumerate(probabilities)
    ]
    chosen = likeliest_ends(make_tree(parents, probabilities), count)[0].tolist()
    assert len(chosen) == min(count, len(parents)) and chosen == sorted(set(chosen))
    best = sorted(ends, reverse=True)[: len(chosen)]
    assert sorted((ends[node] for node in chosen), reverse=True) == pytest.approx(best, abs=1e-12)


def test_likeliest_ends_takes_the_earlier_of_equals():
    # The walk ends at the root with 1 - 1/2 - 1/4 = 1/4, at node 1 with 1/2 - 1/4 = 1/4, at nodes 2 and 3 with 1/4.
    tree = make_tree([-1, 0, 0, 1], [1.0, 0.5, 0.25, 0.25])
    assert likeliest_ends(tree, 2).tolist() == [[0, 1]]
    # A root with one likely child is the least likely end.
    assert likeliest_ends(make_tree([-1, 0], [1.0, 0.75]), 1).tolist() == [[1]]


@quick
@given(parent_lists, st.randoms(use_true_random=False))
def test_nearest_contemplated(parents, rng):
    nodes = rng.sample(range(len(parents)), rng.randrange(len(parents) + 1))
    result = nearest_contemplated(make_tree(parents), torch.tensor([nodes], dtype=torch.long))[0].tolist()
    for node, index in enumerate(result):
        carriers = [ancestor for ancestor in ancestors_or_self(parents, node) if ancestor in nodes]
        assert index == (nodes.index(carriers[0]) if carriers else -1)


@pytest.mark.parametrize("count, expected", [(0, [-1, -1, -1, -1]), (4, [0, 1, 2, 3])])
def test_no_contemplate_token_and_one_each(count, expected):
    tree = make_tree([-1, 0, 0, 1])
    assert nearest_contemplated(tree, likeliest_ends(tree, count)).tolist() == [expected]


@quick
@given(
    parent_lists,
    st.integers(0, 15),
    st.integers(0, 3),
    st.lists(st.booleans(), max_size=5),
    st.integers(1, 3),
)
def test_layout_follows_the_rules(parents, count, soft, filled, length):
    tree = make_tree(parents)
    num_nodes, num_committed = len(parents), len(filled)
    committed = [sum(filled[:i]) if full else -1 for i, full in enumerate(filled)]
    nodes = likeliest_ends(tree, count)
    layout = verify_layout(
        tree,
        nodes,
        slot_position_ids=torch.tensor([committed], dtype=torch.long),
        soft_prompt_length=soft,
        contemplate_length=length,
    )
    root = sum(filled)  # positions 0 .. root - 1 are committed
    owners = list(range(num_nodes)) + length * nodes[0].tolist()
    # How many places behind its node a row stands: 0 for nodes, then all first contemplate tokens, all second ones, ...
    behind = num_nodes * [0] + [1 + number for number in range(length) for _ in nodes[0]]
    positions = [root + tree.depths[0, n].item() + more for n, more in zip(owners, behind, strict=True)]
    assert layout.contemplate_rows == len(owners) - num_nodes
    assert layout.position_ids.tolist() == [positions]
    assert layout.key_places.tolist() == [[-1] * soft + committed + positions]
    assert layout.mask.shape == (1, len(owners), soft + num_committed + len(owners))
    for row, owner in enumerate(owners):
        contemplates = row >= num_nodes
        expected = {soft + i for i in range(num_committed) if filled[i]}
        expected |= {soft + num_committed + node for node in ancestors_or_self(parents, owner)}
        if contemplates:
            own = [other for other in range(num_nodes, row + 1) if owners[other] == owner]
            expected |= set(range(soft)) | {soft + num_committed + other for other in own}
        assert set(layout.mask[0, row].nonzero().flatten().tolist()) == expected


def test_layout_of_a_batch_with_rows_of_different_length():
    trees = stack_trees([make_tree([-1, 0, 1]), make_tree([-1, 0, 0])])
    committed = torch.tensor([[-1, -1, 0], [0, 1, 2]])
    layout = verify_layout(trees, torch.tensor([[2], [0]]), slot_position_ids=committed, soft_prompt_length=1)
    assert layout.position_ids.tolist() == [[1, 2, 3, 4], [3, 4, 4, 4]]
    assert layout.key_places[:, :4].tolist() == [[-1, -1, -1, 0], [-1, 0, 1, 2]]


@pytest.mark.parametrize(
    ("batch_size", "committed", "offset"), [(1, 0, 0), (1, 5, 0), (3, 4, torch.tensor([[1], [0], [2]]))]
)
def test_a_plain_step_is_laid_out_as_any_tree(batch_size, committed, offset):
    """Where nothing is drafted and no slot is empty there is less to calculate, and no mask is needed."""
    tree = root_only(torch.arange(batch_size))
    no_nodes = tree.tokens[:, :0]
    slots = torch.arange(committed).expand(batch_size, -1)
    places = torch.full((batch_size, 1), committed)
    arguments = {"slot_position_ids": slots, "soft_prompt_length": 0, "root_places": places, "position_offset": offset}
    layouts = [verify_layout(tree, no_nodes, **arguments, has_gaps=has_gaps) for has_gaps in (False, True)]
    assert [layout.sees_all for layout in layouts] == [True, False]
    plain, general = ({**vars(layout), "sees_all": None} for layout in layouts)
    for name, value in general.items():
        assert torch.equal(plain[name], value) if isinstance(value, torch.Tensor) else plain[name] == value, name


@pytest.mark.parametrize("lengths", [[3, 5], [4, 4]])
def test_soft_prompts_or_ragged_rows_need_a_mask(lengths):
    tree, slots = root_only(torch.tensor([7, 8])), torch.arange(max(lengths)).expand(2, -1)
    prompts = 0 if len(set(lengths)) > 1 else 2
    layout = verify_layout(
        tree, tree.tokens[:, :0], slot_position_ids=slots, soft_prompt_length=prompts, lengths=lengths, has_gaps=False
    )
    assert not layout.sees_all and not layout.mask.all()


def render(layout, committed, contemplate_nodes):
    """Draw the mask of the first row of a batch: `#` = may attend."""
    num_soft, num_nodes = layout.soft_prompt_length, layout.tokens.shape[1]
    sizes = [num_soft, len(committed), num_nodes, len(contemplate_nodes)]

    def line(name, cells):
        groups = []
        for size, width in zip(sizes, [1, 1, 1, 2], strict=True):  # names of contemplate tokens take two columns
            groups.append(" ".join(cell.ljust(width) for cell in cells[:size]))
            cells = cells[size:]
        return f"{name:<16}{'   '.join(groups)}".rstrip()

    header = ["s"] * num_soft + ["c" if position >= 0 else "-" for position in committed]
    header += [str(node) for node in range(num_nodes)] + [f"c{node}" for node in contemplate_nodes]
    names = [f"node {node}" for node in range(num_nodes)] + [f"contemplate {node}" for node in contemplate_nodes]
    lines = [line("keys", header)]
    for name, row in zip(names, layout.mask[0].tolist(), strict=True):
        lines.append(line(name, ["#" if may_attend else "." for may_attend in row]))
    return "\n".join(lines)


def test_the_drawing_in_the_docstring_is_the_mask():
    committed, contemplate_nodes = [-1, 0, 1], [1, 3]
    layout = verify_layout(
        make_tree([-1, 0, 0, 1]),
        torch.tensor([contemplate_nodes]),
        slot_position_ids=torch.tensor([committed]),
        soft_prompt_length=2,
    )
    documented = [line.strip() for line in inspect.getdoc(VerifyLayout).splitlines()]
    start = next(i for i, line in enumerate(documented) if line.startswith("keys "))
    drawing = render(layout, committed, contemplate_nodes).splitlines()
    assert documented[start : start + len(drawing) + 1] == [*drawing, ""]
    assert layout.position_ids.tolist() == [[2, 3, 3, 4, 4, 5]]  # the positions given below the drawing


def test_errors_tell_what_was_got_and_expected():
    tree = make_tree([-1, 0])
    with pytest.raises(ValueError, match="got total_tokens=-1 and depth=2, expected both"):
        grow_tree(TableDraft(0, 2), torch.tensor([1]), total_tokens=-1, depth=2, top_k=2)
    with pytest.raises(ValueError, match="got count=-1 .*expected 0 or more"):
        likeliest_ends(tree, -1)
    with pytest.raises(ValueError, match=r"DraftTree: got shapes .*'parents': \(1, 1\).*expected all of them equal"):
        DraftTree(tokens=tree.tokens, parents=tree.parents[:, :1], depths=tree.depths, log_probs=tree.log_probs)
    no_slots = torch.zeros(2, 0, dtype=torch.long)
    with pytest.raises(ValueError, match=r"slot_position_ids \(2, 0\).*expected the same batch size"):
        verify_layout(tree, no_slots[:1], slot_position_ids=no_slots, soft_prompt_length=0)
